"""Networks block by block compute what they compute as a whole: states, squares, products, gradients."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_gpu import PretendGpu
from small_models import CONFIGS, make_network

from prism_gguf.measure.calibrate.gradients import backward
from prism_gguf.measure.calibrate.importance import squares_of
from prism_gguf.models.conversions import KnownHead
from prism_gguf.models.cut_check import KNOWN, check_cut
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.network import Network
from prism_gguf.models.streams import Streams
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.testbed import MODEL

TOKENS = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(0))


class Small(HuggingFaceModel):
    """A model that has no files: random weights, and no tokenizer; ``whole`` is not cut into blocks."""

    def __init__(self, network: Any, *, whole: bool = False, device: torch.device | None = None) -> None:
        self._path, self._known = "small", KnownHead()
        self._network = Network("small", network, {}, device)
        check_cut(self._network)
        if whole:
            self._network.run_whole("asked for")
        self._n_rows = len(self.head_weight)


class Gathered:
    """An observer that forms every gradient."""

    def __init__(self) -> None:
        self.gradients: dict[tuple[str, int, int], torch.Tensor] = {}
        self.at_inputs: dict[tuple[str, int, int], torch.Tensor] = {}
        self.lookups: list[torch.Tensor] = []
        self.finished_names: list[str] = []

    def product(self, tensor: QuantizableTensor, matrix: int, window: int, x: Any, delta: Any, at_input: Any) -> None:
        assert tensor.name not in self.finished_names
        for number in range(len(x)):
            key = (tensor.name, matrix, window + number)
            self.gradients[key] = self.gradients.get(key, 0) + delta[number].T @ x[number]
            self.at_inputs[key] = self.at_inputs.get(key, 0) + at_input[number].square().sum(0)

    def embedding(self, window: int, ids: torch.Tensor, delta: torch.Tensor) -> None:
        self.lookups.append(delta)

    def finished(self, tensors: Collection[QuantizableTensor]) -> None:
        self.finished_names += [t.name for t in tensors]


def agree(found: Gathered, expected: Gathered) -> None:
    assert found.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        close(found.gradients[key], gradient)
        close(found.at_inputs[key], expected.at_inputs[key])
    close(torch.cat(found.lookups), torch.cat(expected.lookups))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-12


FEW = ("llama", "gemma2", "gemma3n_text", "qwen3_moe", "mamba")


@pytest.mark.parametrize("kind", [k if k in FEW else pytest.param(k, marks=pytest.mark.slow) for k in CONFIGS])
def test_blocks_compute_what_the_whole_network_does(kind: str) -> None:
    config = CONFIGS[kind]()
    cut, whole = Small(make_network(config)), Small(make_network(config), whole=True)
    assert cut.network.cut is not None, cut.network.uncut
    tokens = TOKENS.numpy().astype(np.int32)
    for a, b, window in zip(cut.states_of(tokens, 7), whole.states_of(tokens, 7), tokens, strict=True):
        (alone,) = cut.window_states(window, 7)
        close(torch.from_numpy(a), torch.from_numpy(b))
        np.testing.assert_array_equal(a, alone.hidden)
    tensors, _ = cut.quantizable_tensors()
    if not tensors:
        return
    squares = [squares_of(model, tokens, model.quantizable_tensors()[0]) for model in (cut, whole)]
    for name in squares[0].sums:
        np.testing.assert_allclose(squares[0].sums[name], squares[1].sums[name], rtol=1e-5)
        np.testing.assert_array_equal(squares[0].counts[name], squares[1].counts[name])
    found, expected = Gathered(), Gathered()
    has_experts = any(t.shape[0] > 1 for t in tensors)
    backward(cut, TOKENS, tensors, found, seed=3)
    if has_experts:  # the whole network gives them the tokens of all windows as one
        for number, window in enumerate(TOKENS):
            one = Gathered()
            backward(whole, window[None], whole.quantizable_tensors()[0], one, seed=3 + number)
            for a, b in ((expected.gradients, one.gradients), (expected.at_inputs, one.at_inputs)):
                a.update({(name, matrix, number): value for (name, matrix, _), value in b.items()})
            expected.lookups += one.lookups
    else:
        backward(whole, TOKENS, whole.quantizable_tensors()[0], expected, seed=3)
    assert sorted(found.finished_names) == sorted(t.name for t in tensors)
    agree(found, expected)


def test_kinds_that_are_not_tried_first_are_those_of_these_tests() -> None:
    assert set(CONFIGS) >= KNOWN


def same_as_whole(checkpoint: Path, tokens: torch.Tensor) -> None:
    """States and every gradient of a checkpoint, block by block and as a whole."""
    found, expected = Gathered(), Gathered()
    with HuggingFaceModel(checkpoint) as cut, HuggingFaceModel(checkpoint) as whole:
        assert cut.network.cut is not None
        whole.network.run_whole("asked for")
        ids = tokens.numpy().astype(np.int32)
        for a, b in zip(cut.states_of(ids, 7), whole.states_of(ids, 7), strict=True):
            close(torch.from_numpy(a), torch.from_numpy(b))
        for model, seen in ((cut, found), (whole, expected)):
            backward(model, tokens, model.quantizable_tensors()[0], seen, seed=1)
    agree(found, expected)


def test_the_embedded_model_by_blocks() -> None:
    same_as_whole(MODEL, TOKENS)


@pytest.mark.slow
def test_smollm2_by_blocks(smollm2: Any) -> None:
    same_as_whole(Path(smollm2.checkpoint), TOKENS[:2] * 100)


def saved(kind: str, folder: Path) -> Path:
    """A checkpoint on disk, with the embedded model's tokenizer."""
    make_network(replaced_vocabulary(CONFIGS[kind]())).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def replaced_vocabulary(config: Any) -> Any:
    config.get_text_config().vocab_size = 4096
    return config


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_stacks_of_experts_are_made_when_their_block_runs(kind: str, tmp_path: Path) -> None:
    folder, tokens = saved(kind, tmp_path / "model"), TOKENS.numpy().astype(np.int32)
    with HuggingFaceModel(folder) as model:
        parameters = dict(model.network.model.named_parameters())
        assert {name for name, p in parameters.items() if p.is_meta} == {n for n in parameters if ".experts." in n}
        whole = make_network(replaced_vocabulary(CONFIGS[kind]()))
        for tensor in model.quantizable_tensors()[0]:
            stack = whole.get_parameter(tensor.parameter)
            for matrix, expected in enumerate(tensor.products(stack)):
                rows = expected[tensor.first_row : tensor.first_row + tensor.shape[1]]
                torch.testing.assert_close(tensor.read(matrix), rows, rtol=0, atol=0)
        found = np.stack(list(model.states_of(tokens, 3)))
        assert all(
            p.is_meta == q.is_meta for p, q in zip(parameters.values(), model.network.model.parameters(), strict=True)
        )
        with torch.no_grad():
            expected = whole.model(input_ids=TOKENS[:, :-1], use_cache=False).last_hidden_state[:, 3:]
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3n_text"])
def test_blocks_come_to_a_gpu_and_go(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended one, which refuses what a real one does: every weight, mask and stream is where it has to be."""
    tokens, config = TOKENS.numpy().astype(np.int32), CONFIGS[kind]()
    here, network = Small(make_network(config)), make_network(config)
    expected, squares = list(here.states_of(tokens, 3)), squares_of(here, tokens, here.quantizable_tensors()[0])
    sizes = {name: p.nbytes for name, p in network.named_parameters()}
    gpu = PretendGpu("cuda:0")
    monkeypatch.setattr("prism_gguf.models.weights._parameter", gpu.parameter)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # which asks for a real one
    for module in ("prism_gguf.models.huggingface", "prism_gguf.measure.calibrate.gradients"):
        monkeypatch.setattr(f"{module}.free_bytes", lambda _: 2**33)
    with gpu:
        there = Small(network, device=gpu.device)
        before = gpu.copied
        found = list(there.states_of(tokens, 3))
        once = sum(size for name, size in sizes.items() if name.startswith(there.network.cut.prefixes))
        assert once <= gpu.copied - before < 1.2 * once  # each block once for all windows, and token ids
        again = squares_of(there, tokens, there.quantizable_tensors()[0])
    np.testing.assert_array_equal(found, expected)
    assert all(np.array_equal(again.sums[name], squares.sums[name]) for name in squares.sums)
    assert not any(p.device.type != "cpu" for name, p in network.named_parameters() if ".layers." in name)


def test_streams_go_to_disk_past_the_limit(tmp_path: Path) -> None:
    like = torch.zeros(1)
    with Streams(100, tmp_path) as streams:
        small, large = streams.new((5, 5), like), streams.new((2, 3), like)
        assert not list(tmp_path.rglob("[0-9]*"))  # a file that is open has no name any more
        assert len(list(tmp_path.iterdir())) == 1
        large[1, 2] = 7.0
        assert large.sum() == 7 and small.sum() == 0 and large.shape == (2, 3)
        del small
        gc.collect()
        again = streams.new((5, 5), like)
        assert again.is_contiguous() and len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_statistics_are_the_same_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["gemma2"]()
    found = []
    for share in (8, 2**60):
        monkeypatch.setattr("prism_gguf.measure.calibrate.gradients.STREAMS_SHARE", share)
        model, seen = Small(make_network(config)), Gathered()
        backward(model, TOKENS, model.quantizable_tensors()[0], seen, seed=1)
        found.append(seen.gradients)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_long_pass_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_gguf.models.kept_stream._EVERY", -1.0)
    config, tokens, kept = CONFIGS["llama"](), TOKENS.numpy().astype(np.int32), tmp_path / "stream.safetensors"
    whole = np.stack(list(Small(make_network(config)).states_of(tokens, 3)))

    def stop_at(block: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        model = Small(make_network(config))
        model.network.model.model.layers[block].mlp.forward = forward
        return model

    with pytest.raises(KeyboardInterrupt):
        list(stop_at(2).states_of(tokens, 3, kept=kept))
    assert kept.is_file()
    with pytest.raises(KeyboardInterrupt):  # other windows begin anew
        list(stop_at(0).states_of(tokens[1:], 3, kept=kept))
    again = np.stack(list(stop_at(1).states_of(tokens, 3, kept=kept)))  # blocks 0 and 1 do not run
    np.testing.assert_array_equal(again, whole)
    assert not kept.exists()
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(np.stack(list(Small(make_network(config)).states_of(tokens, 3, kept=kept))), whole)


class Deeper(torch.nn.Module):
    """A last block that returns a stream of one dimension more, or a norm that takes it away again."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor, **how: Any) -> torch.Tensor:
        return self.module(x, **how)[:, :, None] if how else self.module(x.flatten(2))


def test_blocks_that_return_no_stream_run_as_a_whole() -> None:
    config = CONFIGS["llama"]()
    config.model_type = "of_somebody"
    network = make_network(config)
    network.model.layers[3], network.model.norm = Deeper(network.model.layers[3]), Deeper(network.model.norm)
    model, tokens = Small(network), TOKENS.numpy().astype(np.int32)
    assert model.network.cut is None
    assert "block by block it does not run (its blocks return more than a stream)" in str(model.network.uncut)
    plain = Small(make_network(CONFIGS["llama"]()))
    np.testing.assert_array_equal(list(model.states_of(tokens, 3)), list(plain.states_of(tokens, 3)))


def test_blocks_that_pass_something_on_unseen_run_as_a_whole() -> None:
    config = CONFIGS["llama"]()
    config.model_type = "of_somebody"
    network = make_network(config)
    first, last = network.model.layers[0], network.model.layers[3]
    original, final = first.mlp.forward, last.mlp.forward
    seen: list[torch.Tensor] = []

    def leave(x: torch.Tensor) -> torch.Tensor:
        seen[:] = [x]
        return original(x)

    first.mlp.forward = leave
    last.mlp.forward = lambda x: final(x + seen[0] if seen[0].shape == x.shape else x)
    model = Small(network)
    assert model.network.cut is None
    assert model.network.uncut is not None and "come out otherwise block by block" in model.network.uncut
    tokens = TOKENS.numpy().astype(np.int32)
    for together, window in zip(model.states_of(tokens, 3), tokens, strict=True):
        (alone,) = model.window_states(window, 3)
        np.testing.assert_array_equal(together, alone.hidden)
