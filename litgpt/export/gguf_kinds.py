"""In which types a GGUF file holds its weights, by the name that the whole is known by.

Names such as `q4_k_m` stand for mixtures, which llama.cpp introduced: the matrices that lose most by few bits get more
of them. Those are the head, and in some layers the matrices of attention's values and of the MLP's output. A matrix
whose rows are no whole blocks of 256 values gets the next better format of 32 values. SmolLM2's width of 576 is such a
case: in its `q4_k_m` one matrix of seven is in q4_k or q6_k, the others are in q5_0 and q8_0.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

_TABLE, _OUTPUT = "token_embd.weight", "output.weight"
_SENSITIVE = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\.weight")
# Where 256 values do not divide a row.
_FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def _same(part: str, layer: int, layers: int) -> Type | None:
    return None


def _more_in_half_of_the_layers(part: str, layer: int, layers: int) -> Type | None:
    """q6_k in the first and the last eighth, and in every third layer between them."""
    eighth = layers // 8
    chosen = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return Type.Q6_K if chosen else None


def _more_in_the_first_layers(part: str, layer: int, layers: int) -> Type | None:
    """q5_k in the first four for values, in the first eighth for the MLP."""
    return Type.Q5_K if layer < (layers // 8 if part == "ffn_down" else 4) else None


@dataclass(frozen=True)
class Kind:
    """The types of a file.

    Attributes:
        matrices: That of most matrices. Vectors are float32.
        file_type: GGUF's number for such a file.
        head: That of the head, also of the embedding if the two are one.
        embedding: That of an embedding of its own.
        sensitive: That of a matrix of `_SENSITIVE` by its name, layer and the number of layers; None is `matrices`.
    """

    matrices: Type
    file_type: LlamaFileType
    head: Type
    embedding: Type
    sensitive: Callable[[str, int, int], Type | None] = _same

    def stored(self, name: str, shape: tuple[int, ...], layers: int, tied: bool) -> Type:
        """The type of a tensor by its GGUF name."""
        if len(shape) < 2:
            return Type.F32
        kind = self.matrices
        if name == _OUTPUT or (name == _TABLE and tied):
            kind = self.head
        elif name == _TABLE:
            kind = self.embedding
        elif found := _SENSITIVE.fullmatch(name):
            kind = self.sensitive(found[2], int(found[1]), layers) or kind
        for choice in (kind, _FALLBACKS.get(kind, Type.F16)):
            if shape[-1] % gguf.GGML_QUANT_SIZES[choice][0] == 0:
                return choice
        return Type.F16


def _plain(kind: Type, file_type: LlamaFileType) -> Kind:
    return Kind(kind, file_type, kind, kind)


def _small_blocks(kind: Type, file_type: LlamaFileType) -> Kind:
    """What is outside the layers loses most by few bits: it has 8."""
    return Kind(kind, file_type, Type.Q8_0, Type.Q8_0)


def _mixture(kind: Type, file_type: LlamaFileType, sensitive: Callable[[str, int, int], Type | None] = _same) -> Kind:
    return Kind(kind, file_type, Type.Q6_K, kind, sensitive)


KINDS = {
    "float32": _plain(Type.F32, LlamaFileType.ALL_F32),
    "float16": _plain(Type.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": _plain(Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": _small_blocks(Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": _mixture(Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": _mixture(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _more_in_half_of_the_layers),
    "q5_k_s": _mixture(Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q5_1": _small_blocks(Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": _small_blocks(Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_k_m": _mixture(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, _more_in_half_of_the_layers),
    "q4_k_s": _mixture(Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, _more_in_the_first_layers),
    "q4_1": _small_blocks(Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": _small_blocks(Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
"""By the names that `--dtype` and `--quantize` take for a GGUF file."""
QUANTISED = tuple(name for name in KINDS if name.startswith("q"))
