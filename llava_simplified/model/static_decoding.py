"""The decoding step on GPUs: a KV cache of fixed size, and a CUDA graph of the complete step.

Decoding one token is little work for a GPU: it reads the weights once. But the step consists of a
thousand small kernels, and Python needs more time to launch them than the GPU needs to run them. A CUDA
graph records all launches of a step once, and repeats them with a single call. It always uses the same
addresses and shapes, so these must not change from step to step:

    DynamicCache (CPU)         a new, longer tensor in every step; one row per distinct sequence
    static buffers (GPU)       tensors of a fixed size; each step writes one more column

            columns 0 .. length - 1: prompts and generated tokens    next column     unused
    slot 0  . . a a a a a a a a a a a a a a a a a a a a a a a a a a        a          - - - - -
    slot 1  . . . . . b b b b b b b b b b b b b b b b b b b b b b b        b          - - - - -
    slot 2  - - - - - - - - - - - - - - - - - - - - - - - - - - - -        -          - - - - -

A slot is the place of one sequence in the buffers (letters are its tokens, "." is padding, "-" is unused). Sizes
are rounded up (`num_slots`, `num_columns`), so that a few graphs are enough for batches of all sizes. The GPU
continues to compute the slot of a finished sequence, although the result is not used, until half of the slots
are free. Then the remaining sequences move to buffers with half as many slots. When new sequences join, the
contents move back into a `DynamicCache` (`unload`), to which `DecodingBatch` appends the new rows as usual. The
next step moves everything into the buffers again (`load`).

All sequences write to the same column, because the rows are aligned at their newest token. The index of the
column is a tensor, which the graph itself increments.

The results are the same as without graphs. If a model does not support static buffers, or the graph cannot
be recorded, `DecodingBatch` continues with the `DynamicCache`, and a warning gives the reason.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from llava_simplified.data.device_copy import to_device
from llava_simplified.model.language_model import (
    MASKED_LAYER_TYPES,
    accepts_positions,
    cache_kwarg_name,
    without_peft,
)
from llava_simplified.model.protocols import CaptionModel, CausalLM

logger = logging.getLogger(__name__)

# The number of columns is rounded up to a multiple of this number (of a larger one for long sequences).
COLUMN_STEP = 64
# Maximum number of columns to reserve for new tokens.
RESERVED_COLUMNS = 64
# Maximum share of the free memory that the buffers may take. The rest is needed to prefill the next batch.
MEMORY_SHARE = 0.25
# Number of times to run a step before it is recorded, because libraries allocate their workspaces in the first calls.
WARM_UP_RUNS = 2


class StaticDecodingError(RuntimeError):
    """The decoding step cannot run in static buffers. The message gives the reason."""


class BuffersTooLargeError(StaticDecodingError):
    """This batch is too large for the free memory. A smaller one may fit."""


def num_slots(rows: int) -> int:
    """Return the number of slots for a number of sequences: the next power of two."""
    return 1 << (rows - 1).bit_length()


def num_columns(length: int) -> int:
    """Return the number of columns of a buffer for sequences of this length."""
    # Round up to a multiple of an eighth of the next power of two. For long sequences, at most a fifth of the
    # columns is then unused.
    next_power = 1 << length.bit_length()
    step = max(COLUMN_STEP, next_power // 8)
    return math.ceil(length / step) * step


# ---- attention of one new token ----


def grouped_decode_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute grouped-query attention of one query position without copying keys and values for each query head.

    The query heads that share a key head are passed to PyTorch as several query positions of this head.

    Args:
        module: The attention layer; not used.
        query: (slots, heads, 1, head_dim).
        key: (slots, key heads, columns, head_dim).
        value: (slots, key heads, columns, head_dim).
        attention_mask: (slots, 1, 1, columns), added to the scores.
        scaling: Factor of the scores.

    Returns:
        (slots, 1, heads, head_dim), and None in place of attention weights.
    """
    slots, heads = query.shape[:2]
    key_heads = key.shape[1]
    group_size = heads // key_heads
    # Without this grouping, PyTorch's kernels for masked attention would need a copy of every key for each query head.
    grouped = query.reshape(slots, key_heads, group_size, -1)
    mask = attention_mask.expand(-1, key_heads, group_size, -1)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(slots, 1, heads, -1), None


# No mask function is registered: Transformers passes a 4D mask to this function unchanged.
AttentionInterface.register("grouped_decode", grouped_decode_attention)


@contextmanager
def _grouped_attention(language_model: CausalLM) -> Iterator[None]:
    """Use `grouped_decode_attention` within a `with` block."""
    config = without_peft(language_model).config
    before = config._attn_implementation
    config._attn_implementation = "grouped_decode"
    try:
        yield
    finally:
        config._attn_implementation = before


# ---- buffers ----


class _StaticLayer(CacheLayerMixin):
    """The keys and values of one layer. `update` writes the key and value of the new token into `column`."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()
        self.keys: torch.Tensor = keys  # (slots, key heads, columns, head_dim)
        self.values: torch.Tensor = values
        self.column = column  # int64 (1,)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    # Transformers calls the following methods to build positions and masks. We pass both, so the results do not
    # matter. Different versions of Transformers call different methods.
    def lazy_initialization(self, *_: Any, **__: Any) -> None: ...

    def get_seq_length(self, *_: Any) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        return self.keys.shape[2]


class _Storage:
    """The memory for keys and values. Buffers of all sizes are views of it. Only one of them is in use at a time."""

    def __init__(self, layers: Sequence[Any], slots: int, columns: int) -> None:
        self.flat: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.shapes: list[
            tuple[int, int, int]
        ] = []  # key heads, head_dim of keys, head_dim of values
        for layer in layers:
            _, heads, _, key_size = layer.keys.shape
            value_size = layer.values.shape[-1]
            cells = slots * heads * columns
            keys = layer.keys.new_zeros(cells * key_size)
            values = layer.values.new_zeros(cells * value_size)
            self.flat.append((keys, values))
            self.shapes.append((heads, key_size, value_size))
        # Buffers fit into this memory if slots x columns is not larger than this number.
        self.capacity = slots * columns
        self.nbytes = sum(keys.nbytes + values.nbytes for keys, values in self.flat)

    def views(self, slots: int, columns: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the keys and values of each layer, (slots, key heads, columns, head_dim)."""
        for (keys, values), (heads, key_size, value_size) in zip(self.flat, self.shapes):
            cells = slots * heads * columns
            yield (
                keys[: cells * key_size].view(slots, heads, columns, key_size),
                values[: cells * value_size].view(slots, heads, columns, value_size),
            )


@dataclass
class _Buffers:
    """Everything that a step reads and writes, for one number of slots and columns.

    Attributes:
        cache: A `Cache` whose layers are `_StaticLayer`s.
        mask: bool (slots, columns), True for tokens, False for padding and unused columns.
        column: int64 (1,), index of the column for the next token.
        token_ids: int64 (slots, 1), the newest token of each sequence.
        positions: int64 (slots, 1), the positions of these tokens.
        logits: (slots, vocabulary), the result of the last step.
        graph: The recorded step; None before it is recorded, and on a CPU.
    """

    cache: Any
    mask: torch.Tensor
    column: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor | None = None
    graph: Any = None

    @property
    def slots(self) -> int:
        return self.mask.shape[0]

    @property
    def columns(self) -> int:
        return self.mask.shape[1]


@dataclass
class DecodingState:
    """The state of a batch outside the buffers, with one row per active sequence.

    Attributes:
        cache: A `DynamicCache` with `length` columns.
        mask: int64 (rows, length), 1 for tokens, 0 for padding.
        next_positions: int64 (rows,), the position of the next token of each row.
    """

    cache: Any
    mask: torch.Tensor
    next_positions: torch.Tensor


# ---- the decoder ----


class StaticDecoder:
    """Runs decoding steps of a model in static buffers. One batch at a time owns the buffers.

    Args:
        model: The model.
        use_graphs: Record the steps as CUDA graphs. With False, every step runs without a graph, for tests on a CPU.
    """

    def __init__(self, model: CaptionModel, use_graphs: bool) -> None:
        self._model = weakref.ref(model)
        self._use_graphs = use_graphs
        self._cache_kwarg_name = cache_kwarg_name(model.language_model)
        self._storage: _Storage | None = None
        self._buffers: dict[tuple[int, int], _Buffers] = {}
        self._graph_pool: Any = None
        # Identifies the weights that the graphs were recorded with; see `_drop_outdated_graphs`.
        self._weights_key: Any = None
        self._has_warned = False
        # The batch that is loaded into the buffers:
        self._owner: Any = None  # a weak reference to the batch, or None
        self._current: _Buffers | None = None  # the buffers that contain it
        self._slots: list[int] = []  # the slot of each row of the batch
        self._length = 0  # number of columns in use

    def is_loaded(self, owner: Any) -> bool:
        """Return whether the state of this batch is in the buffers."""
        return self._owner is not None and self._owner() is owner

    def load(self, owner: Any, state: DecodingState, remaining: int) -> None:
        """Move the state of a batch into the buffers. If they contain another batch, it is moved out first.

        Args:
            owner: The batch. Its method `leave_static_buffers` will be called to move it out.
            state: The state of the batch. Its cache is empty afterward.
            remaining: Maximum number of tokens that a sequence may still generate.

        Raises:
            StaticDecodingError: The cache or a type of layer is not supported, or the buffers would be too large
                (`BuffersTooLargeError`). The state is unchanged.
        """
        # The buffers contain another batch, for example, if a program alternates between two calls of `stream`.
        previous = None if self._owner is None else self._owner()
        if previous is not None:
            previous.leave_static_buffers()
        _check_layers(state.cache)
        _check_layer_types(without_peft(self._require_model().language_model).config)
        self._drop_outdated_graphs()

        rows, length = state.mask.shape
        # Reserve at least one column for the next step.
        reserved = min(max(remaining, 1), RESERVED_COLUMNS)
        slots, columns = num_slots(rows), num_columns(length + reserved)
        buffers = self._prepare_buffers(state.cache.layers, slots, columns)
        self._length = length
        for layer, source in zip(buffers.cache.layers, state.cache.layers):
            _fill(layer.keys, source.keys, self._length)
            _fill(layer.values, source.values, self._length)
            source.keys = source.values = None  # to free the memory
        self._fill_mask_and_positions(buffers, state.mask.bool(), state.next_positions)
        self._current = buffers
        self._slots = list(range(rows))
        self._owner = weakref.ref(owner)

    def unload(self) -> DecodingState:
        """Move the state of the batch out of the buffers."""
        assert self._current is not None
        buffers, length = self._current, self._length
        index = self._slot_index()
        cache = DynamicCache(config=self._require_model().config)
        for number, layer in enumerate(buffers.cache.layers):
            keys = layer.keys[:, :, :length].index_select(0, index)
            values = layer.values[:, :, :length].index_select(0, index)
            cache.update(keys, values, number)
        mask = buffers.mask[:, :length].index_select(0, index).long()
        next_positions = buffers.positions[:, 0].index_select(0, index)
        self.release()
        return DecodingState(cache, mask, next_positions)

    def release(self) -> None:
        """Forget the batch, but keep the buffers and graphs for the next batch."""
        self._owner = None
        self._current = None
        self._slots = []

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Remove all rows of the batch except `rows`; see `DecodingBatch._keep`."""
        self._slots = [self._slots[row] for row in rows]
        if not rows:
            self.release()
        elif self._current and num_slots(len(rows)) < self._current.slots:
            self._move_to_fewer_slots(num_slots(len(rows)))

    @property
    def is_full(self) -> bool:
        """Whether there is no column left for a step. If so, call `unload` and `load` before the next step."""
        return self._current is not None and self._length == self._current.columns

    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Append the newest token of each row, and return the logits of the next token (rows, vocabulary).

        Args:
            token_ids: The newest token of each row.

        Raises:
            StaticDecodingError: The step could not be recorded. The state is the same as before the step, and
                `unload` returns it.
        """
        assert self._current is not None and not self.is_full
        buffers = self._current
        # Free slots get the token 0; their results are never read.
        padded = torch.zeros(buffers.slots, 1, dtype=torch.long)
        padded[self._slots, 0] = torch.tensor(token_ids)
        buffers.token_ids.copy_(to_device(padded, buffers.token_ids.device))
        if not self._use_graphs:
            buffers.logits = self._forward(buffers)
        else:
            if buffers.graph is None:
                self._record(buffers)
            buffers.graph.replay()
        self._length += 1
        assert buffers.logits is not None
        # `index_select` returns a copy. The next step overwrites the buffer.
        return buffers.logits.index_select(0, self._slot_index())

    def warn_too_large(self, error: BuffersTooLargeError) -> None:
        """Log that a batch is decoded without graphs, but only the first time."""
        if not self._has_warned:
            logger.warning("large batches are decoded without CUDA graphs: %s", error)
        self._has_warned = True

    # ---- the step ----

    def _forward(self, buffers: _Buffers) -> torch.Tensor:
        """Run the step.

        It is recorded, and a replay repeats it with the Python values of the recording. So no operation may depend on
        a Python value that changes from step to step.
        """
        model = self._require_model()
        language_model = model.language_model
        # Unmask the new column in all slots, even in free ones: the attention of a row in which everything is masked
        # would be NaN.
        buffers.mask.index_fill_(1, buffers.column, True)
        with _grouped_attention(language_model):
            outputs = language_model(
                input_ids=buffers.token_ids,
                attention_mask=self._masks(buffers, without_peft(language_model).config),
                position_ids=buffers.positions,
                use_cache=True,
                **{self._cache_kwarg_name: buffers.cache},
            )
        # Change these tensors in place, so that the next replay reads the new values from the same addresses.
        buffers.positions += 1
        buffers.column += 1
        return outputs.logits[:, -1]

    def _masks(self, buffers: _Buffers, config: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the mask (slots, 1, 1, columns), or one for each type of layer."""
        dtype = buffers.cache.layers[0].keys.dtype
        window = getattr(config, "sliding_window", None)
        layer_types = set(getattr(config, "layer_types", None) or ())
        if not layer_types:
            layer_types = {"sliding_attention" if window else "full_attention"}
        masks = {}
        for layer_type in layer_types:
            attends = buffers.mask
            if layer_type == "sliding_attention" and window and window < buffers.columns:
                # The tokens of a row are in consecutive columns, so the distance between two columns equals the
                # distance between the positions of their tokens.
                index = torch.arange(buffers.columns, device=attends.device)
                attends = attends & (buffers.column - index < window)
            bias = torch.zeros_like(attends, dtype=dtype).masked_fill(~attends, -torch.inf)
            masks[layer_type] = bias[:, None, None]
        return masks.popitem()[1] if len(masks) == 1 else masks

    def _record(self, buffers: _Buffers) -> None:
        """Record the step as a CUDA graph. The state of the sequences does not change.

        Raises:
            StaticDecodingError: The step cannot be recorded.
        """
        device = buffers.mask.device
        # The warm-up changes these tensors, so restore them afterward. The warm-up also writes keys and values into
        # the next column, but the real step overwrites them.
        state = (buffers.mask, buffers.column, buffers.positions)
        saved = [tensor.clone() for tensor in state]
        try:
            # CUDA requires that the warm-up runs on a stream other than the current one.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    self._forward(buffers)
                    for tensor, value in zip(state, saved):
                        tensor.copy_(value)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # "thread_local" allows other threads to use CUDA during the recording, for example to copy images.
            with torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
                logits = self._forward(buffers)
        except Exception as error:
            # The code of the model may raise any exception. All of them mean that decoding must continue without graphs.
            for tensor, value in zip(state, saved):
                tensor.copy_(value)
            raise StaticDecodingError(f"the step cannot be recorded ({error})") from error
        buffers.graph, buffers.logits = graph, logits
        # All graphs share the memory of their intermediate results, because only one runs at a time.
        self._graph_pool = graph.pool()

    # ---- buffers ----

    def _require_model(self) -> CaptionModel:
        model = self._model()
        assert model is not None, "the batch holds a reference to the model"
        return model

    def _slot_index(self) -> torch.Tensor:
        """Return the slot of each row as an index tensor on the device."""
        assert self._current is not None
        return to_device(torch.tensor(self._slots), self._current.mask.device)

    def _drop_outdated_graphs(self) -> None:
        """Drop all graphs if weights have moved in memory, or adapters were enabled, disabled or merged.

        A graph contains the addresses of the weights, and computes the adapters that were active when it was recorded.
        """
        language_model = self._require_model().language_model
        addresses = [parameter.data_ptr() for parameter in language_model.parameters()]
        adapters = []
        for module in language_model.modules():
            if hasattr(module, "lora_A"):
                state = (module.disable_adapters, module.merged, module.active_adapters)
                adapters.append(str(state))
        key = (addresses, adapters)
        if key != self._weights_key:
            self._drop_buffers()
            self._weights_key = key

    def _prepare_buffers(self, layers: Sequence[Any], slots: int, columns: int) -> _Buffers:
        """Return buffers of this size. If they do not fit into the allocated memory, allocate more.

        Args:
            layers: Layers of a cache. Only the shapes of their keys and values are used.
            slots: Number of slots.
            columns: Number of columns.

        Raises:
            BuffersTooLargeError: They would take more than `MEMORY_SHARE` of the free memory.
        """
        if self._storage is None or self._storage.capacity < slots * columns:
            replaced_bytes = 0 if self._storage is None else self._storage.nbytes
            _check_memory(layers, slots, columns, replaced_bytes)
            # Free the old memory before allocating more. Also drop the graphs, which contain addresses of the old memory.
            self._drop_buffers()
            self._storage = None
            self._storage = _Storage(layers, slots, columns)
        if (slots, columns) not in self._buffers:
            self._buffers[slots, columns] = self._create_buffers(self._storage, slots, columns)
        return self._buffers[slots, columns]

    def _drop_buffers(self) -> None:
        """Forget all buffers and graphs, whose addresses are no longer valid."""
        self._buffers.clear()
        self._graph_pool = None

    def _create_buffers(self, storage: _Storage, slots: int, columns: int) -> _Buffers:
        """Create buffers whose keys and values are views of the storage."""
        device = storage.flat[0][0].device
        column = torch.zeros(1, dtype=torch.long, device=device)
        layers: list[Any] = [
            _StaticLayer(keys, values, column) for keys, values in storage.views(slots, columns)
        ]
        return _Buffers(
            cache=Cache(layers=layers),
            mask=torch.zeros(slots, columns, dtype=torch.bool, device=device),
            column=column,
            token_ids=torch.zeros(slots, 1, dtype=torch.long, device=device),
            positions=torch.zeros(slots, 1, dtype=torch.long, device=device),
        )

    def _fill_mask_and_positions(
        self, buffers: _Buffers, mask: torch.Tensor, next_positions: torch.Tensor
    ) -> None:
        """Set the mask, the positions and the index of the next column. Free slots get zeros."""
        rows, length = mask.shape
        buffers.mask.zero_()
        buffers.mask[:rows, :length] = mask
        buffers.positions.zero_()
        buffers.positions[:rows, 0] = next_positions
        buffers.column.fill_(length)

    def _move_to_fewer_slots(self, slots: int) -> None:
        """Move the rows into buffers with fewer slots, which are views of the same memory.

        Args:
            slots: The new number of slots.
        """
        assert self._current is not None
        old, length = self._current, self._length
        index = self._slot_index()
        new = self._prepare_buffers(old.cache.layers, slots, old.columns)
        mask = old.mask[:, :length].index_select(0, index)
        positions = old.positions[:, 0].index_select(0, index)
        for source, target in zip(old.cache.layers, new.cache.layers):
            # `index_select` copies. Without a copy, writing could overwrite rows that are not read yet, because old
            # and new buffers share their memory.
            keys = source.keys[:, :, :length].index_select(0, index)
            values = source.values[:, :, :length].index_select(0, index)
            _fill(target.keys, keys, length)
            _fill(target.values, values, length)
        self._fill_mask_and_positions(new, mask, positions)
        self._current = new
        self._slots = list(range(len(self._slots)))


def _fill(buffer: torch.Tensor, tensor: torch.Tensor, length: int) -> None:
    """Copy keys or values into a buffer, so that they end at column `length`.

    Layers with a sliding window have only the last columns.
    """
    # Set all other columns to zero. Masked columns have the attention weight 0, but uninitialized memory may contain NaN,
    # and 0 * NaN is NaN.
    buffer.zero_()
    rows, _, columns, _ = tensor.shape
    buffer[:rows, :, length - columns : length] = tensor


def _check_layers(cache: DynamicCache) -> None:
    """Raise StaticDecodingError unless all layers consist of keys and values only."""
    for layer in cache.layers:
        # Refuse subclasses too, because they may contain more than keys and values.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise StaticDecodingError(
                f"static buffers do not support a KV cache with a layer of the class {type(layer).__name__}"
            )


def _check_layer_types(config: Any) -> None:
    """Raise StaticDecodingError unless `StaticDecoder._masks` computes the masks of all layers."""
    # Chunked attention (Llama 4), for example, also has keys and values only, but another mask.
    unsupported = set(getattr(config, "layer_types", None) or ()) - MASKED_LAYER_TYPES
    if unsupported:
        raise StaticDecodingError(
            f"static buffers do not support layers of the types {', '.join(sorted(unsupported))}"
        )


def _check_memory(layers: Sequence[Any], slots: int, columns: int, replaced_bytes: int) -> None:
    """Raise BuffersTooLargeError if buffers of this size would take too much memory.

    Args:
        layers: Layers of a cache. Only the shapes of their keys and values are used.
        slots: Number of slots.
        columns: Number of columns.
        replaced_bytes: Size of the old buffers, which are freed before the new ones are allocated.
    """
    device = layers[0].keys.device
    if device.type != "cuda":
        return
    bytes_per_cell = 0
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            bytes_per_cell += tensor.shape[1] * tensor.shape[3] * tensor.element_size()
    free_on_device, _ = torch.cuda.mem_get_info(device)
    # Add the memory that PyTorch has reserved but does not use.
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = replaced_bytes + free_on_device + reserved
    needed = slots * columns * bytes_per_cell
    if needed > MEMORY_SHARE * free:
        raise BuffersTooLargeError(
            f"the buffers of {slots} sequences of {columns} tokens would take {needed / 1e9:.1f} GB of "
            f"{free / 1e9:.1f} GB of free memory; use a smaller batch size"
        )


# ---- the decoder of each model ----

# The decoders of all models that have generated on a GPU; None for a model that does not support static decoding.
_DECODERS: weakref.WeakKeyDictionary[Any, StaticDecoder | None] = weakref.WeakKeyDictionary()


def find_static_decoder(model: CaptionModel) -> StaticDecoder | None:
    """Return the decoder of a model; None if steps must run without CUDA graphs.

    This is the case if the model is not on a CUDA device, if it is being trained, if its attention kernel is not sdpa,
    if it computes the positions of tokens itself, or after a failure.
    """
    if model.device.type != "cuda":
        return None
    language_model = model.language_model
    # Do not use graphs for a model in training: it needs the memory for other things, and sharded weights change their
    # addresses.
    if any(parameter.requires_grad for parameter in language_model.parameters()):
        return None
    if model not in _DECODERS:
        kernel = language_model.config._attn_implementation
        if kernel != "sdpa":
            disable_static_decoding(model, f"it uses the attention kernel {kernel}, not sdpa")
        elif not accepts_positions(language_model):
            # Such a model computes positions from a 2D mask or from the number of columns of the cache.
            disable_static_decoding(model, "it does not accept `position_ids`")
        else:
            _DECODERS[model] = StaticDecoder(model, use_graphs=True)
    return _DECODERS[model]


def disable_static_decoding(model: CaptionModel, reason: str) -> None:
    """Decode a model without CUDA graphs from now on, and log the reason."""
    logger.warning("%s is decoded without CUDA graphs: %s", model.config.model_type, reason)
    _DECODERS[model] = None
