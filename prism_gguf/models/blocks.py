"""Where a network can be cut into blocks, and which of their arguments' dimensions count windows.

transformers' own forward is run on two batches, of two windows and of three, with blocks that only pass on the stream they
are given: the dimension that counts windows is the one that grows. No block's weights are read for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from prism_gguf.system.errors import RuntimeFailureError

Dims = list["int | None"]
"""For each argument of a block, nested ones in order, the dimension that counts windows."""


class CannotCutError(RuntimeFailureError):
    """A network whose blocks cannot be run apart; the message says why."""


@dataclass(frozen=True)
class Cut:
    """Where a network is cut into blocks.

    Attributes:
        blocks: in order.
        prefixes: of their parameters' names.
        dims: of each block's arguments.
        wrapped: whether blocks return the stream in a tuple.
    """

    blocks: Sequence[torch.nn.Module]
    prefixes: tuple[str, ...]
    dims: tuple[Dims, ...]
    wrapped: bool


def block_list(network: Any) -> tuple[str, list[torch.nn.Module]]:
    """The blocks that the residual stream goes through, and their name in the network.

    Raises:
        CannotCutError: no list of modules in the decoder is as long as the configuration says.
    """
    n, decoder = getattr(network.config.get_text_config(), "num_hidden_layers", None), network.get_decoder()
    lists = [m for m in decoder.children() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
    if len(lists) != 1:
        raise CannotCutError(f"{type(network).__name__} has {len(lists)} lists of {n} blocks, where one is needed")
    return next(name for name, module in network.named_modules() if module is lists[0]), list(lists[0])


def find_cut(network: Any, run: Callable[[torch.Tensor], None]) -> Cut:
    """Cut a network into its blocks. Reads no weights but those outside them.

    Args:
        run: runs the network's own forward on token ids (k, n), up to its head.

    Raises:
        CannotCutError: it cannot be cut.
    """
    name, blocks = block_list(network)
    prefixes = tuple(f"{name}.{number}." for number in range(len(blocks)))
    try:
        return Cut(blocks, prefixes, _dims(blocks, run, wrapped=False), wrapped=False)
    except CannotCutError as error:  # a network that expects a tuple makes something else of the stream
        with contextlib.suppress(CannotCutError):
            return Cut(blocks, prefixes, _dims(blocks, run, wrapped=True), wrapped=True)
        raise error


@contextlib.contextmanager
def replaced(blocks: Sequence[torch.nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Blocks with other forwards."""
    before = [vars(block).get("forward") for block in blocks]  # a library may have put its own in place already
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward  # the class's is found again
            else:
                block.forward = own


def passing_on(
    blocks: Sequence[torch.nn.Module], *, wrapped: bool, seen: Callable[[Any, Any], None] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Blocks that pass on the stream they are given, bare or in a tuple, and tell their arguments."""

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        if seen is not None:
            seen(args, kwargs)
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream,) if wrapped else stream

    return replaced(blocks, [pass_on] * len(blocks))


def _dims(blocks: Sequence[torch.nn.Module], run: Callable[[torch.Tensor], None], *, wrapped: bool) -> tuple[Dims, ...]:
    two, three = (_arguments(blocks, run, k, wrapped=wrapped) for k in (2, 3))
    return tuple(_window_dims(a, b) for a, b in zip(two, three, strict=True))


def _arguments(
    blocks: Sequence[torch.nn.Module], run: Callable[[torch.Tensor], None], k: int, *, wrapped: bool
) -> list[tuple[list[Any], TreeSpec]]:
    """The arguments of every block for a batch of k windows."""
    found: list[tuple[list[Any], TreeSpec]] = []
    tokens = torch.arange(k * _PROBED).reshape(k, _PROBED) % 7
    try:
        with passing_on(blocks, wrapped=wrapped, seen=lambda args, kwargs: found.append(tree_flatten((args, kwargs)))):
            run(tokens)
    except Exception as error:  # the network's own code, on what it does not expect
        raise CannotCutError(f"it does not run without its blocks ({type(error).__name__})") from error
    if len(found) != len(blocks):
        raise CannotCutError(f"of {len(blocks)} blocks {len(found)} were called")
    return found


_PROBED = 11  # tokens of a window that is only looked at


def _window_dims(two: tuple[list[Any], TreeSpec], three: tuple[list[Any], TreeSpec]) -> Dims:
    if two[1] != three[1]:
        raise CannotCutError("its blocks get other arguments for more windows")
    dims: Dims = []
    for a, b in zip(two[0], three[0], strict=True):
        if not isinstance(a, torch.Tensor):
            is_plain = a is None or isinstance(a, (bool, int, float, str, torch.dtype))
            if not is_plain and not (isinstance(a, MutableMapping) and not a):
                raise CannotCutError(f"its blocks share a {type(a).__name__}")
            dims.append(None)
            continue
        grown = [at for at, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(grown) > 1:
            raise CannotCutError("an argument of its blocks grows in two ways with the number of windows")
        dims.append(grown[0] if grown else None)
    if dims[0] is None:
        raise CannotCutError("its blocks get all windows as one")
    return dims
