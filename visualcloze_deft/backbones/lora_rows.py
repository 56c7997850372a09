"""Which rows of which layers one layer of a LoRA file holds, by the names that tools give it."""

from __future__ import annotations

from dataclasses import dataclass

from visualcloze_deft.backbones.lora_names import (
    SWAPPED,
    Change,
    Shapes,
    originals,
    split,
    swap_halves,
)
from visualcloze_deft.errors import UserError

_XLABS = {  # its single blocks' queries, keys and values are three of the four parts of linear1
    "double_blocks.{}.processor.qkv1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.proj1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.qkv2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.proj": "single_blocks.{}.linear2",
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The layers whose rows one layer of a file holds. swapped: their halves in the other order."""

    members: tuple[str, ...]
    swapped: bool = False

    def parts(self, change: Change, shapes: Shapes, where: str) -> dict[str, Change]:
        """The change of each member. Raises `UserError`, begun by `where`, if rows are missing."""
        a, b = change
        if len(self.members) == 1 and not self.swapped:
            return {self.members[0]: change}
        expected = sum(shapes[name][0] for name in self.members)
        if b.shape[0] != expected:
            raise UserError(f"{where}: {b.shape[0]} outputs in the file, {expected} here")
        return split((a, swap_halves(b) if self.swapped else b), self.members, shapes)


def known_rows(shapes: Shapes) -> dict[str, Rows]:
    """Every plain name that a layer has in some tool's files, with points or underscores."""
    fused = originals(shapes)
    found = {name: (name,) for name in shapes} | fused
    for original, members in fused.items():
        if len(members) > 1:  # OneTrainer numbers the parts
            found |= {f"{original}.{k}": (member,) for k, member in enumerate(members)}
        if original.endswith(".linear1"):
            found[f"{original.removesuffix('linear1')}processor.qkv"] = members[:3]
    for k in range(len(shapes)):
        for theirs, original in _XLABS.items():
            if (known := original.format(k)) in fused:
                found[theirs.format(k)] = fused[known]
    rows = {name: Rows(members=m, swapped=name == SWAPPED) for name, m in found.items()}
    return rows | {name.replace(".", "_"): row for name, row in rows.items()}
