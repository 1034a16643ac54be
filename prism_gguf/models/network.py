"""A checkpoint's network in transformers: from token ids to the states that enter its output head, block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from prism_gguf.models.bfloat16 import Bfloat16Compute
from prism_gguf.models.block_run import BlockRun, UndefinedStatesError
from prism_gguf.models.blocks import CannotCutError, Cut, block_list, find_cut, passing_on, replaced
from prism_gguf.models.checkpoint_loading import reason
from prism_gguf.models.deferred import Deferred
from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.streams import Streams
from prism_gguf.models.weights import Weights
from prism_gguf.system.errors import RuntimeFailureError, known


class _HeadReached(Exception):
    """Stops a forward pass before the output head, whose product is not needed."""


class Network:
    """A causal language model of transformers, with its weights where they are stored until a block needs them.

    Args:
        path: for messages.
        model: transformers' own, in evaluation mode; of ``deferred`` parameters it has only shapes.
        device: where it computes; None is the CPU.

    Attributes:
        cut: where its blocks are; None where it runs as a whole.
        uncut: why it runs as a whole; None where it runs block by block.

    Raises:
        RuntimeFailureError: transformers cannot run it.
    """

    def __init__(
        self, path: str, model: Any, deferred: MutableMapping[str, Deferred], device: torch.device | None = None
    ) -> None:
        self._path, self.model = path, model
        self.device = device or torch.device("cpu")
        self.head = model.get_output_embeddings()
        self._states: torch.Tensor | None = None
        self._stop = False
        self._hook = self.head.register_forward_pre_hook(self._on_head)
        self.weights = Weights(model, deferred, self.device)
        self.cut: Cut | None = None
        self.uncut: str | None = None
        try:
            name, blocks = block_list(model)
            self.weights.place_outside(f"{name}.{number}." for number in range(len(blocks)))
            self.cut = find_cut(model, self._try)
        except CannotCutError as error:
            self.run_whole(str(error))

    def run_whole(self, why: str) -> None:
        """Leave its blocks together from here on."""
        self.cut, self.uncut = None, why
        self.weights.make_all()
        self.weights.place_outside(())

    def _on_head(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._states = args[0]
        if self._stop:
            raise _HeadReached

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """For the model's own code, which may fail on a configuration that loads."""
        try:
            yield
        except _HeadReached:
            return
        except UndefinedStatesError as error:
            raise self._undefined(f"after {error}") from error
        except Exception as error:
            if known(error) is not None:
                raise
            raise RuntimeFailureError(
                f"{self._path}: transformers loads it as {type(self.model).__name__} and cannot run it: "
                f"{type(error).__name__}: {reason(error)}; look at its config.json"
            ) from error

    def _call(self, tokens: torch.Tensor, mode: Any, *, stop: bool, **more: Any) -> torch.Tensor | None:
        """Run token ids (k, n); logits, or None where the run stops before the head."""
        self._stop, self._states = stop, None
        with mode:
            made: torch.Tensor = self.model(input_ids=tokens.to(self.device), **more).logits
            return made

    def _taken(self) -> torch.Tensor:
        states, self._states = self._states, None
        if states is None:
            raise RuntimeFailureError(f"{self._path}: the forward pass never reached the output head")
        return states

    @torch.no_grad()
    def _try(self, tokens: torch.Tensor) -> None:
        """Run token ids (k, n) up to the head, as the network is at the moment."""
        with contextlib.suppress(_HeadReached):
            self._call(tokens, self.computing(), stop=True, use_cache=False)

    def computing(self) -> TorchFunctionMode:
        """What it computes under."""
        return Float32Compute() if self.weights.dtype == torch.float32 else Bfloat16Compute()

    @contextlib.contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """It computes in another type for a while."""
        own, self.weights.dtype = self.weights.dtype, dtype
        try:
            yield
        finally:
            self.weights.dtype = own

    def _whole_blocks(self, n: int | None = None) -> contextlib.AbstractContextManager[None]:
        """The first n blocks, or all, get their weights when they are called."""
        if self.cut is None:
            return contextlib.nullcontext()

        def forward(block: torch.nn.Module, prefix: str) -> Callable[..., Any]:
            original = block.forward

            def in_place(*args: Any, **kwargs: Any) -> Any:
                with self.weights.in_place(prefix):
                    return original(*args, **kwargs)

            return in_place

        blocks = self.cut.blocks[:n]
        return replaced(blocks, [forward(b, p) for b, p in zip(blocks, self.cut.prefixes, strict=False)])

    @torch.no_grad()
    def forward(
        self, tokens: torch.Tensor, *, logits: bool, cache: DynamicCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States (n, d) that enter the head, and logits (n, V) where wanted, of tokens (n,) that follow ``cache``."""
        made = None
        with self._running(), self._whole_blocks():
            made = self._call(
                tokens[None],
                self.computing(),
                stop=not logits,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return self._taken()[0].float().cpu(), None if made is None else made[0].float().cpu()

    @torch.no_grad()
    def past_one_block(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (n, d) and logits (n, V) of tokens (n,) if all blocks but the first only passed on their stream.

        They are no states of the model, but its head makes of them what it makes of all states. No other weights are
        read, and what is wrong with a configuration shows in the first block too.
        """
        if self.cut is None:
            states, logits = self.forward(tokens, logits=True)
        else:
            others = passing_on(self.cut.blocks[1:], wrapped=self.cut.wrapped)
            with self._running(), self._whole_blocks(1), others:
                logits = self._call(tokens[None], self.computing(), stop=False, use_cache=False)
            states, logits = self._taken()[0].float().cpu(), None if logits is None else logits[0].float().cpu()
        assert logits is not None
        return states, logits

    def outside(self) -> dict[str, torch.Tensor]:
        """Parameters that are in no block, by name; all of them where it is not cut."""
        prefixes = () if self.cut is None else self.cut.prefixes
        return {name: p for name, p in self.model.named_parameters() if not name.startswith(prefixes)}

    def run_of(self, streams: Streams, **how: Any) -> BlockRun:
        """A pass through the blocks; ``how``: see ``BlockRun``."""
        assert self.cut is not None
        return BlockRun(self.cut, self.weights, streams, self.computing, **how)

    def states(
        self, tokens: torch.Tensor, run: BlockRun | None, outside: TorchFunctionMode | None = None
    ) -> torch.Tensor:
        """States (k, n, d) that enter the head, of token ids (k, n), in the type and on the device that it computes in.

        Args:
            run: how blocks run; None runs the network on all windows at once.
            outside: what all that is in no block computes under.
        """
        mode = outside or self.computing()
        with self._running(), self._whole_blocks() if run is None else run.in_blocks():
            self._call(tokens, mode, stop=True, use_cache=False)
        states = self._taken()
        if not torch.isfinite(states).all():
            raise self._undefined("in front of the head")
        return states

    def _undefined(self, where: str) -> RuntimeFailureError:
        return RuntimeFailureError(
            f"{self._path}: undefined (NaN or infinite) hidden states {where}; the weights are damaged"
        )

    def close(self) -> None:
        self._hook.remove()
