"""Byte-level BPE over the `tokenizers` library, in which text can never turn into a control token by itself."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Bpe

from mm.common.errors import UserError
from mm.common.files import read_json, write_json

# In Qwen3's order, then Keye's: after Qwen's 151643 pieces of text these get Qwen's and Keye's own ids.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>",
    "</tool_response>", "<think>", "</think>", "<|point_start|>", "<|point_end|>", "<|ocr_text_start|>",
    "<|ocr_text_end|>", "<|clip_time_start|>", "<|clip_time_end|>", "<|frame|>", "<|fast_start|>",
    "<|fast_end|>",
)  # fmt: skip
SIGLIP_END = "</s>"  # SigLIP's tokenizer ends a caption with it, and fills up the rest of the tower's places
# They shape a conversation: hidden when decoding, never taken from a text.
CONTROL = frozenset({
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<|frame|>", "<|fast_start|>", "<|fast_end|>",
})  # fmt: skip
# Marks inside a text: where and when something is.
GROUNDING = frozenset(
    f"<|{name}_{end}|>"
    for name in ("object_ref", "box", "quad", "point", "ocr_text", "clip_time") for end in ("start", "end")
)  # fmt: skip
# What an assistant's answer may hold besides text.
ANSWER = GROUNDING | {"<think>", "</think>", "<tool_call>", "</tool_call>"}

# How text is cut before merging, as Qwen does: contractions, words with one leading mark, single digits, runs of
# other marks, line ends, blanks. Chinese has no blanks, so a run of it is one "word" and merges can span it. Unlike
# Qwen, capitals in a row stand alone, and so does the mark before them: what a sign says is read by its letters.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}](?=\p{Lu}{2})" r"|\p{Lu}(?=\p{Lu})" r"|(?<=\p{Lu})\p{Lu}(?!\p{Ll})"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+" r"|\p{N}" r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+" r"|\s+(?!\S)" r"|\s+"
)  # fmt: skip


def _byte_level(model: models.BPE) -> Bpe:
    bpe = Bpe(model)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    return bpe


class Tokenizer:
    """Text <-> ids. Make one with `train` or `load`.

    Args:
        bpe: the `tokenizers` object for plain text, without added tokens.
        special: name -> id of the special tokens; those of `SPECIAL_TOKENS` that are missing get the next ids, unless
            it is SigLIP's: that has an end mark of its own, none of them, and a text tower without room for more.
    """

    def __init__(self, bpe: Bpe, special: dict[str, int] | None = None):
        self._bpe, self.special = bpe, dict(special or {})
        self._text_size = max(bpe.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        self._siglip = SIGLIP_END in self.special and not self.special.keys() & set(SPECIAL_TOKENS)
        for name in SPECIAL_TOKENS if not self._siglip else ():
            if name not in self.special:
                self.special[name] = self.vocab_size
        self._names = {i: name for name, i in self.special.items()}
        if len(self._names) < len(self.special):
            raise UserError("tokenizer: two special tokens share one id")
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows that an embedding needs."""
        return max(self._text_size, max(self.special.values(), default=-1) + 1)

    def id(self, name: str) -> int:
        """Id of a special token. Raises UserError for an unknown name."""
        try:
            return self.special[name]
        except KeyError:
            raise UserError(f"{name!r} is not a special token of this tokenizer") from None

    # ---- text to ids

    def encode(self, text: str, *, allow: Collection[str] = ()) -> list[int]:
        """Ids of `text`. Names of special tokens in it stay plain text, except those in `allow`.

        Half a surrogate pair (from a broken JSON escape) is read as U+FFFD.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not allow:
            return self._bpe.encode(text).ids
        ids: list[int] = []
        for piece in self._pattern(frozenset(allow)).split(text):
            if piece in allow:
                ids.append(self.id(piece))
            elif piece:
                ids.extend(self._bpe.encode(piece).ids)
        return ids

    def caption(self, text: str, length: int) -> list[int]:
        """Ids for a text tower, cut to `length` with the end mark. SigLIP's has learned to read the last of all its
        places (64, padded to the end): so with its own tokenizer there are always `length`."""
        ids = self.encode(text)[: length - 1]
        if self._siglip:
            return ids + [self.id(SIGLIP_END)] * (length - len(ids))
        return [*ids, self.id("<|im_end|>")]

    def encode_special(self, text: str) -> list[int]:
        """Ids of our own templates: every special token's name becomes that token. Never for text of users."""
        return self.encode(text, allow=self.special.keys())

    def _pattern(self, names: frozenset[str]) -> re.Pattern[str]:
        if names not in self._patterns:
            longest_first = sorted(names, key=lambda n: (-len(n), n))
            self._patterns[names] = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        return self._patterns[names]

    # ---- ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; control tokens are left out (grounding and think tags stay) unless told otherwise.

        Ids beyond the vocabulary (an embedding may be padded) give nothing; a character cut in two gives U+FFFD.
        """
        text: list[str] = []
        run: list[int] = []
        for i in [*(int(i) for i in ids), None]:
            if i is not None and i not in self._names:
                run.append(i)
                continue
            if run:
                text.append(self._bpe.decode(run, skip_special_tokens=False))
                run = []
            if i is not None and not (skip_special and self._names[i] in CONTROL):
                text.append(self._names[i])
        return "".join(text)

    # ---- making, saving, loading

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges until there are `vocab_size` ids (fewer where the texts have no more to merge).

        The same texts in the same order give the same tokenizer. Raises UserError below the 256 bytes and the
        special tokens.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = vocab_size - len(SPECIAL_TOKENS)
        if pieces < len(alphabet):
            least = len(alphabet) + len(SPECIAL_TOKENS)
            raise UserError(f"vocab_size={vocab_size} is too small; it takes at least {least}")
        bpe = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=pieces, initial_alphabet=alphabet, min_frequency=2, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    def _as_json(self) -> dict[str, Any]:
        added = [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": name in CONTROL}
            for i, name in sorted(self._names.items())
        ]  # fmt: skip
        return {**json.loads(self._bpe.to_str()), "added_tokens": added}

    @cached_property
    def hash(self) -> str:
        """12 hex digits over all that it does."""
        return hashlib.sha256(json.dumps(self._as_json(), sort_keys=True).encode()).hexdigest()[:12]

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which `transformers` and `tokenizers` can read too."""
        write_json(Path(folder) / "tokenizer.json", self._as_json())

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """From `tokenizer.json`, or Qwen's `vocab.json` with `merges.txt`; added tokens also from
        `tokenizer_config.json`. A folder of Qwen3 gets Keye's extra tokens at Keye's ids.

        Raises UserError where files are missing or broken.
        """
        folder = Path(folder)
        special: dict[str, int] = {}
        if (folder / "tokenizer.json").exists():
            data = _object(folder / "tokenizer.json")
            special |= {t["content"]: t["id"] for t in data.get("added_tokens") or []}
            bpe = _parse(data | {"added_tokens": []}, folder / "tokenizer.json")
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            bpe = _from_merges(folder)
        else:
            raise UserError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt")
        if (folder / "tokenizer_config.json").exists():
            added = _object(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
            special |= {t["content"]: int(i) for i, t in added.items()}
        return cls(bpe, special)


def _object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold an object")
    return data


def _from_merges(folder: Path) -> Bpe:
    try:
        bpe = _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{folder}: vocab.json and merges.txt do not go together: {e}") from e
    bpe.normalizer = normalizers.NFC()  # as Qwen's tokenizer.json has it
    return bpe


def _parse(data: dict[str, Any], path: Path) -> Bpe:
    try:
        # A template that adds tokens of its own would add them to every piece of text that we encode.
        return Bpe.from_str(json.dumps(data | {"post_processor": None, "truncation": None, "padding": None}))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer: {e}") from e
