"""Activation offload on a CPU, with a host whose copies happen as late as they may: when they are waited for."""

import gc
import math
import weakref

import pytest
import torch

from hydra_dist.context import ContextParallel, run_ranks
from hydra_dist.errors import ConfigError
from hydra_dist.model import Transformer, initialize, offload
from hydra_dist.model.offload import PinnedHost

LAYERS = 5
LENGTH = 32


class LazyHost:
    """Copies in the order in which they were asked for, none before it is waited for.

    It holds no tensor of the device: copies of memory that was given up while they were under way are counted in
    ``num_lost``. A tensor that is fetched is NaN until then. ``events`` is what happened, in order.
    """

    def __init__(self):
        self.events = []
        self.queue = []
        self.done = 0
        self.num_allocated = 0
        self.num_lost = 0

    def allocate(self, num_bytes):
        self.num_allocated += 1
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, source, buffer):
        self.events.append(("send", tuple(source.shape)))
        return self.begin(source, buffer, to_host=True)

    def fetch(self, buffer, shape, dtype):
        self.events.append(("fetch", tuple(shape)))
        tensor = torch.full(shape, math.nan, dtype=dtype)
        return tensor, self.begin(tensor, buffer, to_host=False)

    def begin(self, tensor, buffer, to_host):
        storage = weakref.ref(tensor.untyped_storage())
        form = tensor.storage_offset(), tensor.shape, tensor.stride()
        dtype, num_bytes = tensor.dtype, tensor.numel() * tensor.element_size()

        def copy():
            memory = storage()
            if memory is None:
                self.num_lost += 1
                return
            on_device = torch.empty(0, dtype=dtype).set_(memory, *form)
            on_host = buffer[:num_bytes].view(dtype).view(on_device.shape)
            (on_host if to_host else on_device).copy_(on_device if to_host else on_host)

        self.queue.append(copy)
        return len(self.queue)

    def wait(self, mark):
        self.events.append(("wait", mark))
        for copy in self.queue[self.done : mark]:
            copy()
        self.done = max(self.done, mark)

    def finish(self, mark):
        self.wait(mark)


def build(config, host=None, smallest=1, **options):
    """A model, and its host's record of which layers computed when."""
    model = Transformer(config, activation_checkpointing="layer", offload_to=host, **options)
    initialize(model, 0)
    if host is not None:
        model.offload.smallest = smallest
        for number, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda m, args, number=number: host.events.append(("layer", number)))
    return model


@pytest.fixture(autouse=True)
def _nothing_waits_for_a_collection():
    """Memory must be given back at once, and not when the garbage collector happens to come by."""
    gc.disable()
    yield
    gc.enable()


def rows():
    tokens = (torch.arange(LENGTH) * 7 % 37).unsqueeze(0)
    return tokens, tokens.roll(-1, 1)


def step(model, seq=None):
    """Loss and all gradients."""
    tokens, targets = rows() if seq is None else (seq.shard(x, 1) for x in rows())
    model.zero_grad()
    loss = model(tokens, seq, targets=targets)
    loss.backward()
    if model.offload is not None:
        assert model.offload.host.num_lost == 0, "device memory was given up while its copy was under way"
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def config(model_config):
    return model_config(num_layers=LAYERS)


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "gqa"}, {"num_layers": 1}, {"num_layers": 2}, {"layer_windows": [4, None]}], ids=str
)
@pytest.mark.parametrize("options", [{}, {"mlp_tile_size": 7}], ids=str)
def test_no_number_changes(changes, options, model_config):
    config = model_config(**{"num_layers": LAYERS, **changes})
    host = LazyHost()
    assert_same(step(build(config, host, **options)), step(build(config, **options)))
    assert bool(host.queue) == (config.num_layers > 1)


def test_no_number_changes_under_autocast(config):
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(build(config, LazyHost())), step(build(config)))


def test_no_number_changes_over_ranks_with_packed_documents(config):
    starts = torch.zeros(1, LENGTH, dtype=torch.long)
    starts[:, 11:] = 11

    def one_rank(mesh, host):
        seq = ContextParallel(mesh).plan(LENGTH, starts)
        return step(build(config, host), seq), seq.stats()

    moved, kept = (run_ranks(2, lambda mesh, h=h: one_rank(mesh, h and h()), timeout=100) for h in (LazyHost, None))
    for (a, sent), (b, sent_without) in zip(moved, kept, strict=True):
        assert_same(a, b)
        assert sent == sent_without


def test_a_read_before_the_copy_is_over_is_seen(config, monkeypatch):
    host = LazyHost()
    model = build(config, host)
    monkeypatch.setattr(host, "wait", lambda mark: None)
    assert not all(x.isfinite().all() for x in step(model))


def test_memory_given_up_before_the_copy_is_over_is_seen(config, monkeypatch):
    def forget(layer):
        for piece in layer.pieces:
            piece.tensor = None if piece.buffer is not None else piece.tensor

    monkeypatch.setattr(offload.Layer, "settle", forget)
    with pytest.raises(AssertionError, match="given up while its copy was under way"):
        step(build(config, LazyHost()))


def backward_events(config):
    """For each layer, where in the events of backward it computes again, and where its input begins to come back."""
    host = LazyHost()
    step(build(config, host))
    layers = [(event[1], i) for i, event in enumerate(host.events) if event[0] == "layer"]
    computed = dict(layers[LAYERS:])
    # Buffers come back in the order of the layers, the last but one first, and the input is a layer's first.
    inputs = [i for i, event in enumerate(host.events) if event == ("fetch", (1, LENGTH, config.hidden_size))]
    return computed, dict(zip(range(LAYERS - 2, -1, -1), inputs, strict=True))


def test_a_layer_comes_back_while_the_one_above_computes(config):
    computed, called = backward_events(config)
    assert list(computed) == list(reversed(range(LAYERS)))
    for layer in range(LAYERS - 1):
        assert called[layer] < computed[layer + 1], "called before the layer above computes"
        assert layer + 2 not in computed or called[layer] > computed[layer + 2], "and not before the one above that"


def test_the_check_above_sees_a_layer_that_is_called_late(config, monkeypatch):
    take = offload.Layer.take

    def without_the_layer_below(layer, index):
        layer.below = None
        return take(layer, index)

    monkeypatch.setattr(offload.Layer, "take", without_the_layer_below)
    with pytest.raises(AssertionError, match="called before the layer above computes"):
        test_a_layer_comes_back_while_the_one_above_computes(config)


def most_inputs_alive(config, host):
    """Layers' inputs on the device at a time, first or brought back, looked at whenever something happens."""
    alive, most = [], 0

    class Watch(list):
        def append(self, event):
            nonlocal most
            super().append(event)
            most = max(most, len({id(x()) for x in alive if x() is not None}))

    model = build(config, host)
    host.events = Watch()
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda m, args: alive.append(weakref.ref(args[0].untyped_storage())))
    fetch = host.fetch

    def watched(buffer, shape, dtype):
        tensor, mark = fetch(buffer, shape, dtype)
        if shape[-1] == config.hidden_size:
            alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor, mark

    host.fetch = watched
    step(model)
    return most


def test_two_layers_inputs_on_the_device_at_most(config):
    assert most_inputs_alive(config, LazyHost()) == 2


def test_the_check_above_sees_inputs_that_stay(config, monkeypatch):
    monkeypatch.setattr(offload.Layer, "settle", lambda layer: None)
    assert most_inputs_alive(config, LazyHost()) == LAYERS


def test_attention_results_leave_the_device_too(config):
    host = LazyHost()
    step(build(config, host))
    sent = [event[1] for event in host.events if event[0] == "send"]
    shapes = {(1, LENGTH, 24), (1, LENGTH, 4, 8), (1, 4, LENGTH)}
    assert set(sent) == shapes, "input, out and lse"
    assert [sent.count(shape) for shape in shapes] == [LAYERS - 1] * 3, "the last layer's stay"
    assert [event[0] for event in host.events].count("fetch") == len(sent)


def test_small_tensors_stay(config):
    host = LazyHost()
    assert_same(step(build(config, host, smallest=4 * LENGTH * 32 + 1)), step(build(config)))
    assert host.queue == []


def test_buffers_are_used_again(config):
    host = LazyHost()
    model = build(config, host)
    first = step(model)
    allocated = host.num_allocated
    assert 0 < allocated <= 3 * (LAYERS - 1)
    assert len(model.offload.free) == allocated
    assert_same(step(model), first)
    assert host.num_allocated == allocated


def test_two_graphs_at_a_time_have_buffers_of_their_own(config):
    model, plain = build(config, LazyHost()), build(config)
    for m in (model, plain):
        tokens, targets = rows()
        losses = [m(tokens, targets=targets), m(tokens.flip(1), targets=targets)]
        for loss in losses:
            loss.backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_buffer_that_is_too_small_is_replaced(config):
    moved = offload.ActivationOffload(LazyHost(), ())
    small, middle = moved.take_buffer(10), moved.take_buffer(20)
    moved.free += [middle, small]
    assert moved.take_buffer(15) is middle
    assert len(moved.take_buffer(30)) == 30
    assert moved.free == []


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_nothing_behind(where, config):
    host = LazyHost()
    model = build(config, host)
    expected = step(build(config))

    def fail(*args):
        raise KeyError("on purpose")

    if where == "forward":
        hook = model.layers[3].register_forward_pre_hook(fail)
    else:
        hook = model.layers[2].mlp_norm.weight.register_hook(fail)
    with pytest.raises(KeyError, match="on purpose"):
        step(model)
    hook.remove()
    assert host.queue
    assert model.offload.free
    assert_same(step(model), expected)
    # Autograd holds what an aborted backward has not come to until the next one, whatever that is.
    assert len(model.offload.free) == host.num_allocated
    assert host.done == len(host.queue), "a copy is still under way"
    allocated = host.num_allocated
    assert_same(step(model), expected)
    assert host.num_allocated == allocated


def test_a_graph_that_is_never_used_gives_its_buffers_back(config):
    host = LazyHost()
    model = build(config, host)
    loss = model(rows()[0], targets=rows()[1])
    assert model.offload.free == []
    del loss
    assert len(model.offload.free) == host.num_allocated


def test_without_gradients_nothing_moves(config):
    host = LazyHost()
    model = build(config, host)
    with torch.no_grad():
        model(rows()[0], targets=rows()[1])
    assert host.queue == []


@pytest.mark.parametrize("layer", [1, LAYERS - 1], ids=["moved", "stays"])
def test_a_change_in_place_is_refused(layer, config):
    model = build(config, LazyHost())
    model.layers[layer].attention_norm.register_forward_pre_hook(lambda m, args: args[0].detach().add_(1))
    with pytest.raises(RuntimeError, match="changed in place"):
        step(model)


def test_a_graph_may_be_gone_through_twice(config):
    """Attention's results come back again as well, which checkpointing without offload does not allow."""
    model = build(config, LazyHost())
    tokens, targets = rows()
    once = step(model)[1:]
    model.zero_grad()
    loss = model(tokens, targets=targets)
    for retain_graph in (True, False):
        loss.backward(retain_graph=retain_graph)
    for twice, expected in zip((p.grad for p in model.parameters()), once, strict=True):
        assert torch.equal(twice, 2 * expected)


def test_what_cannot_work_is_refused(config):
    with pytest.raises(ConfigError, match=r"train.activation_offload=false works"):
        PinnedHost(torch.device("cpu"))
    with pytest.raises(ConfigError, match="activation_checkpointing is none; layer works"):
        Transformer(config, offload_to=LazyHost())
    with pytest.raises(ConfigError, match="compile without offload"):
        build(config, LazyHost()).compile_layers(backend="eager")
