"""Make the embedded base's tokenizers: python scripts/train_base_text.py --out work/base

T5's is a sentencepiece unigram model, CLIP's a byte-level BPE, both on the words of scenes and
tasks. Sentences that stand in every grid are single tokens of T5's, which keeps the text short.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from visualcloze_deft.data.scenes import Scenes
from visualcloze_deft.grid import CONTENT_PREFIX, layout_sentence
from visualcloze_deft.registry import load_tasks

T5_VOCABULARY = 512
CLIP_VOCABULARY = 1200  # 512 bytes and word-final bytes, then merges
MAX_TOKENS = 40
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
blue purple pink brown striped spotted plain ball cube cylinder cone first last row column given
based achieve each logical task demonstrated condition target
""".split()


def corpus() -> list[str]:
    source = Scenes(size=64, seed=0)
    lines = (list(WORDS) + [word.capitalize() for word in WORDS]) * 100
    for i in range(4000):
        lines.extend(source.item(i).texts.values())
    for task in load_tasks().values():
        lines.extend([task.sentence(), task.sentence(task.roles[::-1])] * 60)
    for layout in LAYOUTS:
        lines.extend([f"{layout_sentence(*layout)} {CONTENT_PREFIX}"] * 100)
    return lines


def train_t5(lines: list[str], out: Path) -> T5Tokenizer:
    work = out / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(work),
        vocab_size=T5_VOCABULARY,
        character_coverage=1.0,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-[]()",
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(work) + ".model")
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)
    tokenizer.add_tokens([layout_sentence(*layout) for layout in LAYOUTS] + [CONTENT_PREFIX])
    tokenizer.add_tokens([f"[IMAGE{k}]" for k in range(1, 7)])
    tokenizer.save_pretrained(out / "tokenizer_2")
    (out / "spiece.model").replace(out / "tokenizer_2" / "spiece.model")
    (out / "spiece.vocab").unlink()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = corpus()
    t5, clip = train_t5(lines, options.out), train_clip(lines, options.out)
    lengths = []
    for task in load_tasks().values():
        for i in range(50):
            text = Scenes(size=64, seed=3).item(i).texts.get(task.content, "")
            words = f"{layout_sentence(2, 2)} {task.sentence()} {CONTENT_PREFIX} {text}"
            lengths.append((len(t5(words).input_ids), len(clip(words).input_ids)))
    print(
        "vocabulary",
        len(t5),
        len(clip),
        "tokens, longest and mean:",
        np.max(lengths, 0),
        np.mean(lengths, 0),
    )
    print(t5.tokenize(words), clip.tokenize(words))


if __name__ == "__main__":
    main()
