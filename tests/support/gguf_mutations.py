"""What strangers may have done to a GGUF: a file and a sentence for every seed.

``parse`` and ``pack`` know GGUF's structure by themselves (ggml/docs/gguf.md): nothing here leans on what is tested.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES

STRING, ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_POWERS = (16, 24, 31, 32, 40, 63, 64)
_EDGES = (0, 1, 2, 3, 31, 32, 255, 256, *(2**n - d for n in _POWERS for d in (0, 1)))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e30, 3.4e38, math.inf, -math.inf, math.nan)
HOSTILE = (
    b"",
    b"\x00",
    b"\xff\xfe\xfa",
    b"\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.\u2066exe".encode(),
    b"<script>alert(1)</script>",
    b"[x](javascript:alert(1))|`",
    b"{{ 7*7 }}{% for x in range(10**9) %}{% endfor %}",
    b"%s%n%n%n",
    b"../../../../etc/passwd",
    b"a" * 2**20,
    "\U0001f4a9".encode() * 50_000,
)


class Span(NamedTuple):
    """A structural field: what it is, and where it lies."""

    label: str
    start: int
    end: int


@dataclass
class Entry:
    """A metadata entry; ``item`` is the type of an array's items."""

    key: bytes
    type: int
    value: Any
    item: int = 0


@dataclass
class Tensor:
    """A tensor with its bytes; ``offset`` only where it is to be said wrongly."""

    name: bytes
    dims: list[int]
    type: int
    data: bytes = b""
    offset: int | None = None

    def fit(self) -> None:
        """As many bytes as type and dimensions ask for, repeated or cut, where that is no great number."""
        block, size = GGML_QUANT_SIZES.get(self.type, (0, 0))  # type: ignore[call-overload]
        wanted = math.prod(self.dims) // block * size if block else 2**63
        if wanted < 2**22:
            self.data = (self.data * -(-wanted // len(self.data)))[:wanted]


@dataclass
class Gguf:
    version: int
    entries: list[Entry]
    tensors: list[Tensor]
    alignment: int = 32

    def offsets(self) -> list[int]:
        """Where each tensor begins, one behind the other."""
        ends = accumulate(len(t.data) + -len(t.data) % self.alignment for t in self.tensors)
        return [0, *ends][: len(self.tensors)]


class _Source:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: int) -> Any:
        layout = f"<{_FORMATS[kind]}"
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def text(self) -> bytes:
        length = self.number(10)
        self.at += length
        return self.data[self.at - length : self.at]

    def value(self, kind: int) -> Any:
        return self.text() if kind == STRING else self.number(kind)


def parse(data: bytes) -> Gguf:
    """An intact GGUF as what it is made of."""
    source = _Source(data)
    source.at = 4
    version, n_tensors, n_entries = source.number(4), source.number(10), source.number(10)
    entries = []
    for _ in range(n_entries):
        key, kind = source.text(), source.number(4)
        if kind == ARRAY:
            item, count = source.number(4), source.number(10)
            entries.append(Entry(key, kind, [source.value(item) for _ in range(count)], item))
        else:
            entries.append(Entry(key, kind, source.value(kind)))
    tensors, starts = [], []
    for _ in range(n_tensors):
        name = source.text()
        dims = [source.number(10) for _ in range(source.number(4))]
        tensors.append(Tensor(name, dims, source.number(4)))
        starts.append(source.number(10))
    begin = -(-source.at // 32) * 32
    for tensor, start, end in zip(tensors, starts, [*starts[1:], len(data) - begin], strict=True):
        tensor.data = data[begin + start : begin + end]
    return Gguf(version, entries, tensors)


@dataclass
class _Sink:
    out: bytearray = field(default_factory=bytearray)
    spans: list[Span] = field(default_factory=list)

    def raw(self, label: str, data: bytes) -> None:
        self.spans.append(Span(label, len(self.out), len(self.out) + len(data)))
        self.out += data

    def number(self, label: str, kind: int, value: Any) -> None:
        layout = f"<{_FORMATS[kind]}"
        if kind in (6, 12):
            data = struct.pack(layout, value)
        else:
            size = struct.calcsize(layout)
            data = (int(value) % 256**size).to_bytes(size, "little")
        self.raw(label, data)

    def text(self, label: str, data: bytes) -> None:
        self.number(f"{label} length", 10, len(data))
        self.raw(label, data)

    def value(self, label: str, kind: int, value: Any) -> None:
        if kind == STRING:
            self.text(label, value)
        else:
            self.number(label, kind, value)


def pack(made: Gguf) -> tuple[bytes, list[Span]]:
    """The file's bytes, and where each of its fields lies."""
    sink = _Sink()
    sink.raw("magic", b"GGUF")
    sink.number("version", 4, made.version)
    sink.number("tensor count", 10, len(made.tensors))
    sink.number("key count", 10, len(made.entries))
    for entry in made.entries:
        name = entry.key[:40].decode("utf-8", "replace")
        sink.text(f"key {name}", entry.key)
        sink.number(f"{name} type", 4, entry.type)
        if entry.type == ARRAY:
            sink.number(f"{name} item type", 4, entry.item)
            sink.number(f"{name} count", 10, len(entry.value))
            for at, value in enumerate(entry.value):
                sink.value(f"{name}[{at}]", entry.item, value)
        else:
            sink.value(f"{name} value", entry.type, entry.value)
    for tensor, due in zip(made.tensors, made.offsets(), strict=True):
        name = tensor.name[:40].decode("utf-8", "replace")
        sink.text(f"tensor {name}", tensor.name)
        sink.number(f"{name} dimensions", 4, len(tensor.dims))
        for at, size in enumerate(tensor.dims):
            sink.number(f"{name} dimension {at}", 10, size)
        sink.number(f"{name} type", 4, tensor.type)
        sink.number(f"{name} offset", 10, due if tensor.offset is None else tensor.offset)
    sink.raw("padding", b"\0" * (-len(sink.out) % made.alignment))
    for tensor in made.tensors:
        sink.raw("data", tensor.data + b"\0" * (-len(tensor.data) % made.alignment))
    return bytes(sink.out), sink.spans


def boundaries(data: bytes) -> list[tuple[int, str]]:
    """Every place between two structural fields, and what a file that ends there lacks first."""
    _, spans = pack(parse(data))
    return [(span.start, span.label) for span in spans if span.start < span.end]


Change = Callable[[Gguf, random.Random], str]
ByteChange = Callable[[bytearray, list[Span], random.Random], str]


def _edge(rng: random.Random, true: int) -> int:
    return rng.choice([*_EDGES, true - 1, true + 1, 2 * true, true // 2, -1, rng.randrange(2**64), rng.randrange(1000)])


def _structural(data: bytearray, spans: list[Span], rng: random.Random) -> str:
    """Another number in a count, length, type, dimension or offset; everything after it stays where it was."""
    words = ("count", "length", "type", "dimension", "offset", "version")
    numbers = [s for s in spans if s.end - s.start in (4, 8) and any(word in s.label for word in words)]
    few = [s for s in numbers if "tokenizer" not in s.label]  # a vocabulary is most of the header
    span = rng.choice(few if rng.random() < 0.9 else numbers)
    true = int.from_bytes(data[span.start : span.end], "little")
    value = _edge(rng, true) % 256 ** (span.end - span.start)
    data[span.start : span.end] = value.to_bytes(span.end - span.start, "little")
    return f"{span.label}: {true} → {value}"


def _flip_header(data: bytearray, spans: list[Span], rng: random.Random) -> str:
    header = next(s.start for s in spans if s.label == "data")
    places = [rng.randrange(8 * header) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
    for bit in places:
        data[bit // 8] ^= 1 << bit % 8
    return f"header bits {places[:4]}… flipped" if len(places) > 4 else f"header bits {places} flipped"


def _flip_data(data: bytearray, spans: list[Span], rng: random.Random) -> str:
    start = next(s.start for s in spans if s.label == "data")
    count = rng.choice((1, 8, 1000, 100_000))
    for _ in range(count):
        bit = rng.randrange(8 * start, 8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    return f"{count} bits of data flipped"


def _poison(data: bytearray, spans: list[Span], rng: random.Random) -> str:
    """A tensor's data replaced by one pattern: scales become NaN, infinite, huge or zero."""
    span = rng.choice([s for s in spans if s.label == "data"])
    pattern = rng.choice(
        (b"\x00", b"\xff", b"\x00\x7c", b"\x00\x7e", b"\xff\x7b", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f")
    )
    size = span.end - span.start
    some = size if rng.random() < 0.7 else rng.randrange(1, 64) * len(pattern)
    data[span.start : span.start + some] = (pattern * size)[:some]
    return f"{some} bytes of data at {span.start} became {pattern.hex()}"


def _tail(data: bytearray, spans: list[Span], rng: random.Random) -> str:
    if rng.random() < 0.5:
        more = rng.randbytes(rng.choice((1, 31, 32, 4096)))
        data += more
        return f"{len(more)} bytes behind its end"
    cut = rng.randrange(len(data))
    del data[cut:]
    return f"cut at byte {cut}"


def _noise(data: bytearray, spans: list[Span], rng: random.Random) -> str:
    size = rng.choice((0, 1, 20, 1000))
    data[4 : 4 + size] = rng.randbytes(size)
    return f"{size} random bytes behind the magic"


def _number_entry(made: Gguf, rng: random.Random) -> str:
    """A hyperparameter or id that means something else, in a file that is otherwise whole."""
    entry = rng.choice([e for e in made.entries if e.type not in (STRING, ARRAY)])
    old = entry.value
    entry.value = rng.choice(_FLOATS) if entry.type in (6, 12) else _edge(rng, int(entry.value))
    return f"{entry.key.decode()}: {old} → {entry.value}"


def _text_entry(made: Gguf, rng: random.Random) -> str:
    names = b"llama gemma2 qwen2 mamba gpt2 phi3 t5 bert deepseek2 clip mixtral".split()
    pres = b"default llama-bpe qwen2 deepseek-coder unknown-pre".split()
    models = b"gpt2 llama bert t5 rwkv plamo2 none no_vocab".split()
    known = {b"general.architecture": names, b"tokenizer.ggml.pre": pres, b"tokenizer.ggml.model": models}
    entry = rng.choice([e for e in made.entries if e.type == STRING])
    entry.value = rng.choice((*known.get(entry.key, ()), *HOSTILE))
    return f"{entry.key.decode()} = {entry.value[:30]!r} ({len(entry.value)} bytes)"


def _array_entry(made: Gguf, rng: random.Random) -> str:
    """A vocabulary or other array of another length, with other items, or of another item type."""
    entry = rng.choice([e for e in made.entries if e.type == ARRAY])
    values, name = list(entry.value), entry.key.decode()
    way = rng.choice(("empty", "shorter", "longer", "items", "same", "swap"))
    if way == "empty" or not values:
        values = []
    elif way == "shorter":
        values = values[: rng.randrange(len(values))]
    elif way == "longer":
        values = values * rng.choice((2, 3, 50))
    elif way == "items":
        for _ in range(rng.choice((1, 10))):
            values[rng.randrange(len(values))] = _item(entry, rng)
    elif way == "same":
        values = values[:1] * len(values)
    else:
        rng.shuffle(values)
    entry.value = values
    return f"{name}: {way}, {len(values)} items"


def _item(entry: Entry, rng: random.Random) -> Any:
    if entry.item == STRING:
        return rng.choice((*HOSTILE, b"no-space", b" ", b"a b c", b"\xc4\xa0"))
    return rng.choice(_FLOATS) if entry.item == 6 else _edge(rng, 1)


def _retype(made: Gguf, rng: random.Random) -> str:
    """A value of another type, in a file that is otherwise whole."""
    entry = rng.choice(made.entries)
    old, kind = entry.type, rng.choice([*_FORMATS, STRING, ARRAY])
    if kind == STRING:
        entry.value = str(entry.value)[:40].encode()
    elif kind == ARRAY:
        item = rng.choice([*_FORMATS, STRING])
        entry.value = [b"x"] * rng.randrange(4) if item == STRING else [rng.randrange(2)] * rng.randrange(4)
        entry.item = item
    else:
        entry.value = entry.value if isinstance(entry.value, (int, float)) else rng.randrange(100)
        if kind not in (6, 12):
            entry.value = int(entry.value)
    entry.type = kind
    return f"{entry.key.decode()}: type {old} → {kind}"


def _new_entry(made: Gguf, rng: random.Random) -> str:
    """A key that the file did not have."""
    numbers = (
        b"split.count", b"split.no", b"split.tensors.count", b"llama.expert_count", b"llama.expert_used_count",
        b"llama.attention.key_length", b"llama.attention.value_length", b"llama.attention.sliding_window",
        b"llama.rope.scaling.original_context_length", b"llama.pooling_type", b"llama.leading_dense_block_count",
        b"tokenizer.ggml.unknown_token_id", b"tokenizer.ggml.padding_token_id", b"tokenizer.ggml.fim_pre_token_id",
        b"general.quantization_version", b"llama.expert_feed_forward_length", b"llama.nextn_predict_layers",
    )  # fmt: skip
    floats = (
        b"llama.logit_scale", b"llama.final_logit_softcapping", b"llama.rope.scaling.factor", b"llama.residual_scale",
        b"llama.rope.scaling.attn_factor", b"llama.embedding_scale", b"llama.attention.scale",
        b"llama.attention.clamp_kqv",
    )  # fmt: skip
    texts = (
        b"general.type", b"llama.rope.scaling.type", b"quantize.imatrix.file", b"prism_gguf.recipe", b"prism_gguf.base",
        b"general.description", b"tokenizer.chat_template.tool_use",
    )  # fmt: skip
    which = rng.randrange(4)
    if which == 0:
        entry = Entry(rng.choice(numbers), 4, _edge(rng, 1))
    elif which == 1:
        entry = Entry(rng.choice(floats), 6, rng.choice(_FLOATS))
    elif which == 2:
        entry = Entry(rng.choice(texts), STRING, rng.choice((b"yarn", b"longrope", b"adapter", b"imatrix", *HOSTILE)))
    else:
        key = rng.choice(
            (b"llama.attention.head_count_kv", b"llama.feed_forward_length", b"llama.attention.head_count")
        )
        made.entries = [e for e in made.entries if e.key != key]
        entry = Entry(key, ARRAY, [_edge(rng, 2) for _ in range(rng.choice((0, 1, 1, 2, 600)))], 4)
    made.entries.insert(rng.randrange(len(made.entries) + 1), entry)
    shown = entry.value[:30] if isinstance(entry.value, (bytes, list)) else entry.value
    return f"{entry.key.decode()} = {shown!r} added"


def _keys(made: Gguf, rng: random.Random) -> str:
    """A key twice, gone, or called otherwise."""
    entry = rng.choice(made.entries)
    way, name = rng.choice(("twice", "gone", "renamed")), entry.key.decode()
    if way == "twice":
        made.entries.append(deepcopy(entry))
    elif way == "gone":
        made.entries.remove(entry)
    else:
        entry.key = rng.choice((*HOSTILE, b"GGUF.version", b"general.alignment"))
    return f"{name} {way}: {entry.key[:30]!r}"


def _tensors(made: Gguf, rng: random.Random) -> str:
    """A tensor twice, gone, called otherwise, or in another's place."""
    tensor, other = rng.choice(made.tensors), rng.choice(made.tensors)
    way = rng.choice(("twice", "gone", "renamed", "as another", "offset swapped", "overlaps"))
    name = tensor.name.decode()
    if way == "twice":
        made.tensors.append(deepcopy(tensor))
    elif way == "gone":
        made.tensors.remove(tensor)
    elif way == "renamed":
        tensor.name = rng.choice(
            (*HOSTILE, b"blk.9999999999.attn_q.weight", b"x" * 64, b"output.bias", b"blk.0.attn_q.bias")
        )
    elif way == "as another":
        tensor.name, other.name = other.name, tensor.name
    elif way == "offset swapped":
        at, offsets = {id(t): n for n, t in enumerate(made.tensors)}, made.offsets()
        tensor.offset, other.offset = offsets[at[id(other)]], offsets[at[id(tensor)]]
    else:
        tensor.offset = made.offsets()[made.tensors.index(other)]
    return f"{name} {way}: {tensor.name[:30]!r}"


def _tensor_type(made: Gguf, rng: random.Random) -> str:
    tensor = rng.choice(made.tensors)
    old, tensor.type = tensor.type, rng.choice([*range(42), 255, 2**31, 2**32 - 1])
    if fits := rng.random() < 0.6:
        tensor.fit()
    return f"{tensor.name.decode()}: type {old} → {tensor.type}, {'with' if fits else 'without'} the bytes"


def _dims(made: Gguf, rng: random.Random) -> str:
    """Other dimensions, some with the same number of elements."""
    tensor = rng.choice(made.tensors)
    old = list(tensor.dims)
    way = rng.choice(("swap", "edge", "none", "more", "flat", "product"))
    if way == "swap":
        tensor.dims = tensor.dims[::-1]
    elif way == "edge":
        tensor.dims[rng.randrange(len(old))] = _edge(rng, old[0]) % 2**64
    elif way == "none":
        tensor.dims = []
    elif way == "more":
        tensor.dims = [*old, *[rng.choice((0, 1, 1, 2))] * rng.choice((1, 2, 3, 6))]
    elif way == "flat":
        tensor.dims = [math.prod(old)]
    else:
        tensor.dims = [2**32, 2**32] if rng.random() < 0.5 else [old[0] * 2, *[max(1, n // 2) for n in old[1:]]]
    if fits := rng.random() < 0.6:
        tensor.fit()
    return f"{tensor.name.decode()}: dimensions {old} → {tensor.dims}, {'with' if fits else 'without'} the bytes"


def _align(made: Gguf, rng: random.Random) -> str:
    """An alignment that the file keeps or not, in a type that it may have or not."""
    value = rng.choice((0, 1, 2, 3, 8, 16, 31, 64, 4096, 2**20, 2**31, 2**32 - 1))
    made.entries = [e for e in made.entries if e.key != b"general.alignment"]
    made.entries.append(Entry(b"general.alignment", rng.choice((4, 4, 4, 4, 5, 10, 6, 7)), value))
    if kept := rng.random() < 0.3 and value in (8, 16, 64, 4096):
        made.alignment = value
    return f"general.alignment = {value}, {'kept' if kept else 'not kept'}"


def _reshuffled(made: Gguf, rng: random.Random) -> str:
    """Entries and tensors in another order: a file like any other."""
    rng.shuffle(made.entries)
    return "metadata in another order"


def _version(made: Gguf, rng: random.Random) -> str:
    made.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
    return f"version {made.version}"


_CHANGES: dict[Change, int] = {  # and how often
    _number_entry: 24, _text_entry: 8, _array_entry: 12, _retype: 8, _new_entry: 12, _keys: 5, _tensors: 8,
    _tensor_type: 8, _dims: 8, _align: 3, _reshuffled: 1, _version: 1,
}  # fmt: skip
_BYTE_CHANGES: dict[ByteChange, int] = {
    _structural: 20, _flip_header: 10, _flip_data: 5, _poison: 8, _tail: 2, _noise: 1,
}  # fmt: skip


def mutation(seed: int, intact: bytes) -> tuple[bytes, str]:
    """What ``seed`` makes of an intact file, and what that was; one seed in six makes two changes."""
    rng = random.Random(seed)
    made = parse(intact)
    changes: dict[Any, int] = {**_CHANGES, **_BYTE_CHANGES}
    chosen = rng.choices(list(changes), list(changes.values()), k=2 if rng.random() < 1 / 6 else 1)
    said = [change(made, rng) for change in chosen if change in _CHANGES]
    packed, spans = pack(made)
    data = bytearray(packed)
    said += [change(data, spans, rng) for change in chosen if change in _BYTE_CHANGES]
    return bytes(data), "; ".join(said)
