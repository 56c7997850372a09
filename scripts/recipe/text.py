"""Make the text side: tokenizers, and encoders that know what words of prompts mean.

Tokenizers: T5's is a sentencepiece unigram model, CLIP's a byte-level BPE, both on the words of
scenes and tasks. Sentences that stand in every grid are single tokens of T5's, which keeps the text
short. Encoders: small ones, trained to say what the words of a prompt mean (of which thing they
speak, its colour, texture, shape and place, what is done to it, which task), and then frozen, as
FLUX's are. The transformer finds colours in their states in a fraction of the time it would take
to learn the language itself (docs/lab-log.md).
Axes: b prompt, n token, d width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from families import families
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from recipe.stage import NOTED_EVERY, Plan, Sitting
from visualcloze_deft.data.sources.renderer import COLOURS, SHAPES
from visualcloze_deft.data.sources.scenes import Scenes, caption, draw_scene
from visualcloze_deft.grids.prompt import CONTENT_PREFIX, Prompt, layout_sentence
from visualcloze_deft.task_registry.task import Task

STAGE = "text"
T5_VOCABULARY = 512
CLIP_VOCABULARY = 1200  # 512 bytes and word-final bytes, then merges
MAX_TOKENS = 40
WIDTH = 64
BATCH = 64
PROMPTS, PROMPTS_A_MINUTE = 30_000, 15_000  # at most, and of a minute that is trained
LEARNING_RATE = 2e-3
LAYOUTS = [(rows, columns) for columns in (1, 2, 3, 4) for rows in (1, 2, 3, 4)]
# Everyday words of prompts, so that a user's own task is not spelled out letter by letter.
WORDS = """
the a an of in on with and to from by for is are as at into same other new old left right top
bottom front behind next near far small large big bright dark light shadow colour color grey gray
image picture photo photograph drawing painting sketch style scene room table floor wall sky
street object person man woman dog cat bird car house tree flower cup mug bottle box bag toy book
chair make turn add remove replace change put place move rotate keep edit restore show generate
complete depth edge edges normal normals segmentation map mask pose outline background foreground
reference subject view hole noise blur blurred sharp grey black white red orange yellow green cyan
blue purple pink brown striped spotted checkered planked plain wall ball cube cylinder cone
first last row column given based achieve each logical task demonstrated condition target
""".split()


def corpus() -> list[str]:
    source = Scenes(size=64, seed=0)
    lines = (list(WORDS) + [word.capitalize() for word in WORDS]) * 100
    for i in range(4000):
        lines.extend(source.item(i).texts.values())
    for task in families().values():
        lines.extend([task.sentence(), task.sentence(task.roles[::-1])] * 60)
    for layout in LAYOUTS:
        lines.extend([f"{layout_sentence(*layout)} {CONTENT_PREFIX}"] * 100)
    return lines


def train_t5(lines: list[str], out: Path) -> T5Tokenizer:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        vocab_size=T5_VOCABULARY,
        character_coverage=1.0,
        model_type="unigram",
        normalization_rule_name="identity",  # nmt_nfkc's table alone is 240 KB
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-[]()",
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)
    tokenizer.add_tokens([layout_sentence(*layout) for layout in LAYOUTS] + [CONTENT_PREFIX])
    tokenizer.add_tokens([f"[IMAGE{k}]" for k in range(1, 7)])
    tokenizer.save_pretrained(out / "tokenizer_2")
    (out / "tokenizer_2" / "spiece.model").write_bytes(trained.getvalue())
    return tokenizer


def train_clip(lines: list[str], out: Path) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(m) for m in merges]
    names = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    vocabulary = {piece: index for index, piece in enumerate(names)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(out / "tokenizer")
    return tokenizer


def new_encoders(t5: T5Tokenizer, clip: CLIPTokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    return (
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        ),
        T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=WIDTH,
                d_kv=32,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=t5.pad_token_id,
                eos_token_id=t5.eos_token_id,
            )
        ),
    )


# What a word can mean: one question each, answered with the index of a value or -1 (not asked).
MEANINGS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "noun": (*SHAPES, "floor", "wall"),
    "texture": ("plain", "striped", "spotted", "checkered", "planked"),
    "order": ("first", "second", "third", "fourth", "fifth"),  # phrase of the sentence
    "place": ("left", "middle", "right"),
    "action": ("turn", "replace", "add", "remove", "none"),
    "outcome": ("no", "yes"),  # what an edit makes, not what it finds
}


BETWEEN = {"a", "an", "the", "on", "in", "with", *MEANINGS["action"]}


def phrases(words: list[str]) -> list[list[int]]:
    """Indices of the words of each phrase: 'turn the red ball blue' has [2, 3] and [4]."""
    found: list[list[int]] = [[]]
    for k, word in enumerate(words):
        if word not in BETWEEN:
            found[-1].append(k)
        if found[-1] and (word in BETWEEN or word in MEANINGS["noun"]):
            found.append([])
    return [phrase for phrase in found if phrase]


def meaning(text: str) -> list[dict[str, int]]:
    """For each word of a caption or instruction, the answers that its phrase gives."""
    words = text.replace(",", "").split()
    action = words[0] if words[0] in MEANINGS["action"] else "none"
    answers: list[dict[str, int]] = [{} for _ in words]
    before: dict[str, str] = {}
    for order, phrase in enumerate(phrases(words)):
        said = {q: words[k] for k in phrase for q in MEANINGS if words[k] in MEANINGS[q]}
        if "place" not in said:
            if action in ("turn", "replace"):  # what replaces a red ball is red
                said = before | said
            said = {"texture": "plain"} | said
        made = action == "add" or (action in ("turn", "replace") and order > 0)
        said |= {"action": action, "outcome": "yes" if made else "no"}
        said["order"] = MEANINGS["order"][order]
        before = {q: said[q] for q in ("colour", "noun", "texture") if q in said}
        for k in phrase:
            answers[k] = {q: MEANINGS[q].index(value) for q, value in said.items()}
    return answers


class Questions(nn.Module):
    """Linear answers: to every question at every token of T5's, and to all at once from CLIP's."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.sizes = [len(values) for values in MEANINGS.values()]
        self.token = nn.Linear(WIDTH, sum(self.sizes) + 3)
        self.pooled = nn.Linear(WIDTH, len(MEANINGS["order"]) * sum(self.sizes))
        self.task = nn.ModuleList([nn.Linear(WIDTH, tasks) for _ in range(2)])

    def loss(self, states: Tensor, pooled: Tensor, answers: Tensor, task: Tensor) -> Tensor:
        """answers: (b n questions), -1 where not asked; task: (b,)."""
        b = len(answers)
        said = self.token(states)
        total = functional.cross_entropy(self.task[0](states[:, 0]), task)
        total = total + functional.cross_entropy(self.task[1](pooled), task)
        shades = torch.tensor(list(COLOURS.values()))
        asked = answers[..., 0] >= 0
        error = said[..., -3:][asked] - shades[answers[..., 0][asked]]
        total = total + error.square().mean()
        every = self.pooled(pooled).unflatten(1, (len(MEANINGS["order"]), -1))
        order = list(MEANINGS).index("order")
        for q, (part, whole) in enumerate(
            zip(said[..., :-3].split(self.sizes, -1), every.split(self.sizes, -1), strict=True)
        ):
            total = total + functional.cross_entropy(
                part.flatten(0, 1), answers[..., q].flatten(), ignore_index=-1
            )
            summary = torch.full((b, len(MEANINGS["order"])), -1)
            i, n = torch.nonzero((answers[..., order] >= 0) & (answers[..., q] >= 0)).T
            summary[i, answers[i, n, order]] = answers[i, n, q]
            total = total + functional.cross_entropy(
                whole.flatten(0, 1), summary.flatten(), ignore_index=-1
            )
        return total


def draw_prompt(
    rng: np.random.Generator, t5: T5Tokenizer, tasks: Sequence[Task]
) -> tuple[str, Tensor, int]:
    """A prompt as in training, what its tokens mean (n questions), and its task's number."""
    scene = draw_scene(rng)
    k = int(rng.integers(len(tasks)))
    task = tasks[k]
    order = task.roles if rng.random() < 0.7 else task.roles[::-1]
    text = caption(scene) if rng.random() < 0.5 else scene.instruction
    sentence = task.sentence(order)
    rows = 1 + int(rng.integers(3))
    whole = str(Prompt(rows=rows, columns=len(order), task=sentence, content=text))
    answers = torch.full((MAX_TOKENS, len(MEANINGS)), -1)
    tokens = t5.tokenize(whole)
    n = len(tokens) - len(t5.tokenize(text))  # the content comes last
    for word, means in zip(text.split(), meaning(text), strict=True):
        for _ in t5.tokenize(word):
            for q, question in enumerate(MEANINGS):
                if n < MAX_TOKENS:
                    answers[n, q] = means.get(question, -1)
            n += 1
    if n != len(tokens):
        raise ValueError(f"words and tokens of {text!r} do not match: {tokens}")
    return whole, answers, k


def make(plan: Plan) -> None:
    """Train tokenizers and encoders; a second sitting does nothing where they are there."""
    if (plan.output / "text_encoder_2").is_dir():
        return
    lines = corpus()
    train_encoders(plan, train_t5(lines, plan.output), train_clip(lines, plan.output))


def train_encoders(plan: Plan, t5: T5Tokenizer, clip: CLIPTokenizer) -> None:
    torch.manual_seed(plan.seed)
    small, large = new_encoders(t5, clip)
    tasks = list(families().values())
    questions = Questions(len(tasks))
    modules = nn.ModuleList([small, large, questions])
    optimiser = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    rng = np.random.default_rng(plan.seed)
    count = min(PROMPTS, max(round(PROMPTS_A_MINUTE * plan.minutes[STAGE]), BATCH))
    drawn = [draw_prompt(rng, t5, tasks) for _ in tqdm(range(count), desc="prompts")]
    padded: dict[str, Any] = {
        "padding": "max_length",
        "truncation": True,
        "return_tensors": "pt",
    }
    texts = [text for text, _, _ in drawn]
    ids = t5(texts, max_length=MAX_TOKENS, **padded).input_ids
    words = clip(texts, **padded).input_ids
    answers, kinds = torch.stack([a for _, a, _ in drawn]), torch.tensor([k for _, _, k in drawn])
    sitting = Sitting(plan, STAGE)
    for spent in sitting:
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (1 - spent) * 3 + 0.01)
        chosen = torch.from_numpy(rng.integers(len(drawn), size=BATCH))
        states = large(ids[chosen]).last_hidden_state
        pooled = small(words[chosen]).pooler_output
        loss = questions.loss(states, pooled, answers[chosen], kinds[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        if sitting.due("noted", NOTED_EVERY):
            sitting.note({"loss": round(loss.item(), 4)})
    small.save_pretrained(plan.output / "text_encoder")
    large.save_pretrained(plan.output / "text_encoder_2")
