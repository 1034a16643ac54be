"""Tensor types that the llama.cpp and gguf-py here do not know: of forks, of the past, or of the future."""

from __future__ import annotations

import re

# ggml.h of ik_llama.cpp, August 2026. Its _R types are rows of the same type, interleaved.
IK_LLAMA = {
    97: "Q8_0_X4", 98: "Q8_1_X4", 99: "Q8_2_X4", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64", 137: "IQ2_K",
    138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 142: "IQ2_TN", 143: "IQ1_TN", 144: "IQ4_KS", 145: "IQ2_KS",
    146: "IQ4_KSS", 147: "Q8_K16", 148: "Q8_K32", 149: "Q8_KR8", 150: "Q8_K128", 151: "Q8_KV", 152: "IQ5_KS",
    153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT", 202: "Q4_0_R8",
    206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4",
    216: "IQ2_XXS_R4", 217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4",
    222: "IQ2_S_R4", 223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4",
    337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4",
    353: "MXFP4_R8", 397: "Q8_K_R16", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip
# ggml.h of llama.cpp: read once, and no more. BitNet's fork took number 36 for its I2_S.
REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4 (or I2_S of BitNet's fork)",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
_NEWEST = 1023  # numbers beyond are no types, but damage
# What is about as large, by the bits in a name.
_NEAR = {"1": "IQ1_M", "2": "IQ2_S", "3": "IQ3_S", "4": "IQ4_XS", "5": "Q5_K", "6": "Q6_K", "8": "Q8_0"}


def of_another_build(number: int) -> str | None:
    """What is known of a type's number that this build does not have, and what to do; None for a number of damage."""
    if (name := IK_LLAMA.get(number)) is not None:
        return (
            f"type {number} ({name} of ik_llama.cpp), which llama.cpp does not have: the file is sound, and runs in that "
            "fork only; take one that llama.cpp made"
        )
    if (name := REMOVED.get(number)) is not None:
        return f"type {number} ({name}), which llama.cpp has removed: take a newer file of the model"
    if number <= _NEWEST:
        return (
            f"type {number}, which the gguf package and llama.cpp here do not know: of a newer llama.cpp (update "
            "llama-cpp-python and gguf), or of a fork"
        )
    return None


def instead_of(name: str) -> str | None:
    """What to take in place of a type that only ik_llama.cpp has, in words; None for any other name."""
    name = name.upper()
    if name not in IK_LLAMA.values() and not re.fullmatch(r".*_R\d+", name):
        return None
    from gguf import GGMLQuantizationType

    plain = re.sub(r"_R\d+$", "", name)
    bits = re.search(r"\d", plain)
    near = plain if plain in GGMLQuantizationType.__members__ else _NEAR.get(bits[0] if bits else "", "Q8_0")
    return f"'{name}' is a type of ik_llama.cpp, which llama.cpp does not have; {near} is about as large"
