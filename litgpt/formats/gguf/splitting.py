"""The ways of cutting a text into words that GGUF files know by name (`tokenizer.ggml.pre`)."""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA_3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORDS}|\p{{N}}|{_REST}"
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST}"
)
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class Splitting:
    """How a byte-level BPE cuts a text into words before merging.

    Attributes:
        patterns: The words, cut out by one pattern after the other; none means GPT-2's.
        digits: Every digit is a word of its own, before anything else.
        compose: The text is brought to Unicode's composed form (NFC) first.
        ignore_merges: A word that is a token is that token, whatever the merges say.
        adds_bos: BOS is put first unless the metadata say otherwise.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    compose: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """What cuts a text so."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


# By `tokenizer.ggml.pre`. The patterns are those of the tokenizers that the files were made from.
_LLAMA_BPE = Splitting((_LLAMA_3,), ignore_merges=True, adds_bos=True)
SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "phi-2", "roberta-bpe"), Splitting()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), Splitting(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA_BPE),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting((_LLAMA_3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), Splitting((_QWEN_2,), compose=True)),
    "tekken": Splitting((_TEKKEN,), ignore_merges=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Splitting((_GPT_4O,))),
    "deepseek-v3": Splitting(_DEEPSEEK_3, adds_bos=True),
}
