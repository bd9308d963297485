"""Kronecker factors of whole networks: from the definition, layer by layer, and where they are exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF, AutogradGGN, kfac
from laplace.errors import PerformanceWarning, UnsupportedError
from tests.networks import NETWORKS, Applied, Network, named, parameter
from tests.tools import assert_close, assert_mean_is


def backend(cls, network: Network, model=None, **options):
    return cls(network.model() if model is None else model, network.likelihood, **options)


def blocks(engine, network: Network) -> dict[str, list[torch.Tensor]]:
    """Factors by parameter, inputs divided by the number of their rows."""
    (x, y), names = network.data(), engine.network.names
    kron = engine.kron(x, y, N=1)[1]
    return dict(zip(names, kron.divide_inputs(kron.counts).kfacs, strict=True))


def layer_rows(network: Network, layer: str, *, unfold=None, fisher: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """By hooks and one backward pass per datum and class: inputs [data, T, I] and gradients [data, columns, T, O]."""
    model, seen = network.model(), {}
    model.get_submodule(layer).register_forward_hook(lambda _m, a, out: seen.update(a=a[0], out=out))
    (x, y), inputs, gradients = network.data(), [], []
    for b in range(len(y)):
        f = model(x[b : b + 1])[0]
        if fisher:
            directions = [f.softmax(-1).detach() - F.one_hot(y[b], len(f))]
        else:
            p = f.softmax(-1).detach()
            root = torch.linalg.cholesky(torch.diag(p) - torch.outer(p, p) + 1e-15 * torch.eye(len(p)))
            directions = list(root.T)
        a = seen["a"].detach()
        inputs.append(unfold(a)[0] if unfold else a.reshape(-1, a.shape[-1]))
        columns = [torch.autograd.grad(f, seen["out"], d, retain_graph=True)[0][0] for d in directions]
        columns = [g.flatten(1).T if unfold else g.reshape(-1, g.shape[-1]) for g in columns]
        gradients.append(torch.stack(columns))
    return torch.stack(inputs), torch.stack(gradients)


def check_layer(network, layer: str, *, unfold=None, fisher: bool = False, reduce: bool = False) -> None:
    a, g = layer_rows(network, layer, unfold=unfold, fisher=fisher)
    if reduce:
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    G, A = torch.einsum("bqto,bqtp->op", g, g), torch.einsum("bti,btj->ij", a, a) / a[..., 0].numel()
    options = {"kfac_approx": "reduce"} if reduce else {}
    found = blocks(backend(AutogradEF if fisher else AutogradGGN, network, **options), network)
    # The root of the softmax Hessian is singular: its jitter is seen at the level of its square root.
    torch.testing.assert_close(found[f"{layer}.weight"][0], G, rtol=1e-6, atol=1e-6)
    assert_close(found[f"{layer}.weight"][1], A)
    torch.testing.assert_close(found[f"{layer}.bias"][0], G, rtol=1e-6, atol=1e-6)
    assert len(found[f"{layer}.bias"]) == 1


CONV = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def unfolded(a: torch.Tensor) -> torch.Tensor:
    return F.unfold(a, **CONV).transpose(1, 2)


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
@pytest.mark.parametrize("fisher", [False, True], ids=["GGN", "EF"])
def test_factors_are_sums_over_data_and_positions(fisher, reduce):
    if fisher and reduce:
        with pytest.raises(TypeError):
            backend(AutogradEF, named("mlp"), kfac_approx="reduce")
        return
    check_layer(named("mlp"), "0", fisher=fisher, reduce=reduce)
    check_layer(named("conv2d"), "0", unfold=unfolded, fisher=fisher, reduce=reduce)
    check_layer(named("encoder"), "layer.linear1", fisher=fisher, reduce=reduce)
    check_layer(named("flattened_head"), "head", fisher=fisher, reduce=reduce)


def test_an_embedding_counts_its_tokens():
    network = named("embedding")
    tokens, G = blocks(backend(AutogradGGN, network), network)["embed.weight"]
    x = network.data()[0]
    kept = x[x != 1]  # the row of padding_idx is not trained
    assert_close(tokens, torch.bincount(kept, minlength=5).double())
    _, g = layer_rows(network, "embed")
    mask = (x != 1).double()
    torch.testing.assert_close(G * len(kept), torch.einsum("bqto,bqtp,bt->op", g, g, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("network", [n for n in NETWORKS if n.kron], ids=str)
@pytest.mark.filterwarnings("ignore:The recurrent layers:laplace.errors.PerformanceWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_groups_without_factors_get_their_exact_block(network):
    """Norms, bare parameters, recurrent layers: the block of the dense GGN, or its diagonal."""
    ggn, sizes = network.problem().ggn(), [p.numel() for p in network.model().parameters() if p.requires_grad]
    starts = dict(zip(network.problem().names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    found = blocks(backend(AutogradGGN, network), network)
    for (name, sides), size in zip(found.items(), sizes, strict=True):
        rows = slice(starts[name], starts[name] + size)
        one = len(sides) == 1
        exact = name in network.slow or any(
            part in name for part in ("norm", "shift", "scale", "token", "position", "offset")
        )
        if one and exact and name != "position.weight":
            block = ggn[rows, rows]
            assert_close(sides[0], block.diagonal() if sides[0].dim() == 1 else block, name)
        assert (sides[0].dim() == 1) == (name in network.slow and name.startswith("recurrent")) or not one, name


def test_a_large_group_without_factors_gets_its_diagonal(monkeypatch):
    monkeypatch.setattr(kfac, "DENSE_LIMIT", 3)
    network = named("layer_norm")
    side = blocks(backend(AutogradGGN, network), network)["1.weight"][0]
    assert_close(side, network.problem().ggn().diagonal()[16:20])


def test_one_linear_layer_with_gaussian_likelihood_and_joint_bias_is_exact():
    """The bias joined as a constant feature: G x A is then the whole GGN, and for softmax no such product is."""
    x = torch.cat([torch.randn(7, 3), torch.ones(7, 1)], 1)
    model = nn.Linear(4, 2, bias=False)
    engine = AutogradGGN(model, "regression")
    y = torch.randn(7, 2)
    kron = engine.kron(x, y, N=7)[1]
    assert_close(kron.to_matrix(), engine.full(x, y)[1])
    softmax, labels = AutogradGGN(model, "classification"), torch.randint(2, (7,))
    assert not torch.allclose(softmax.kron(x, labels, N=7)[1].to_matrix(), softmax.full(x, labels)[1])


@pytest.mark.parametrize(
    "name", ["mlp", "mlp_regression", "no_bias", "batch_norm_1d", "layer_norm", "rms_norm", "bare_parameters"]
)
def test_one_datum_gives_the_blocks_of_the_exact_ggn(name):
    network = named(name)
    model, (x, y) = network.model(), network.data()
    engine = backend(AutogradGGN, network, model)
    ggn, kron = engine.full(x[:1], y[:1])[1], engine.kron(x[:1], y[:1], N=1)[1]
    sizes = [p.numel() for p in model.parameters()]
    exact = torch.block_diag(*(ggn[sum(sizes[:i]) :, sum(sizes[:i]) :][:n, :n] for i, n in enumerate(sizes)))
    assert_close(kron.to_matrix(), exact)


@pytest.mark.parametrize(
    "name", ["attention", "attention_batch_first", "encoder", "cross_attention", "packed_cross_attention"]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_attention_is_represented_and_its_projections_see_one_datum_exactly(name):
    """`out_proj` never runs as a module: the trace of each block is that of the definition, and positive."""
    network = named(name)
    found = blocks(backend(AutogradGGN, network), network)
    for key in ("out_proj.weight", "in_proj_weight", "out_proj.bias"):
        sides = [sides for parameter_name, sides in found.items() if parameter_name.endswith(key)]
        for block in sides:
            assert all(float(side.trace() if side.dim() == 2 else side.sum()) > 0 for side in block)
    # With one datum and one position there is no sharing: blocks are those of the dense GGN.
    model = Applied(
        lambda m, x: m.head(m.attend(x, x, x)[0][:, 0]),
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    model, x, y = model.double().eval(), torch.randn(1, 1, 4), torch.tensor([1])
    engine = AutogradGGN(model, "classification")
    ggn, kron = engine.full(x, y)[1], engine.kron(x, y, N=1)[1]
    sizes = [p.numel() for p in model.parameters()]
    exact = torch.block_diag(*(ggn[sum(sizes[:i]) :, sum(sizes[:i]) :][:n, :n] for i, n in enumerate(sizes)))
    assert_close(kron.to_matrix(), exact)


def test_tied_weights_sum_over_their_uses():
    network = named("tied_layers")
    G, A = blocks(backend(AutogradGGN, network), network)["0.weight"]
    first, second = (layer_rows(network, layer) for layer in ("0", "2"))
    torch.testing.assert_close(
        G, sum(torch.einsum("bqto,bqtp->op", g, g) for _, g in (first, second)), rtol=1e-6, atol=1e-6
    )
    assert_close(A, sum(torch.einsum("bti,btj->ij", a, a) for a, _ in (first, second)) / 10)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tied_embedding", "'embed.weight'.*share no factors"),
        ("unused", "'other.weight'.*do not depend on it"),
        ("transposed_weight", "'second'.*share no factors"),
    ],
)
def test_what_has_no_factors_is_refused_by_name(name, says):
    network = named(name)
    with pytest.raises(UnsupportedError, match=f'(?s)Kronecker factors ."kron", "ekfac". cannot.*{says}.*"diag"'):
        backend(AutogradGGN, network).kron(*network.data(), N=1)


class Hidden(torch.autograd.Function):
    """A function that nothing can watch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


def test_a_parameter_that_was_never_seen_is_exact_row_by_row_and_refused_by_kron():
    model = Applied(lambda m, x: m.head(Hidden.apply(x, m.gain)), gain=parameter(3), head=nn.Linear(3, 3)).double()
    network = Network("hidden", lambda: model, named("mlp").inputs, named("mlp").targets)
    engine, (x, y) = AutogradGGN(model, "classification"), network.data()
    J = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(v, list(model.parameters()), retain_graph=True)])
            for v in model(x).flatten()
        ]
    )
    with pytest.warns(PerformanceWarning, match=r"'gain': it is used by a function that cannot be watched"):
        assert_close(engine.jacobians(x)[0].flatten(0, 1), J)
    with pytest.raises(UnsupportedError, match=r"'gain'.*no formula sees it"):
        engine.kron(x, y, N=1)


def test_recurrent_layers_without_a_formula_get_diagonals_and_a_warning_that_names_them():
    network = named("lstm_projected")
    with pytest.warns(PerformanceWarning, match=r"'recurrent'.*exact"):
        found = blocks(backend(AutogradGGN, network), network)
    assert {sides[0].dim() for name, sides in found.items() if name.startswith("recurrent")} == {1}


@pytest.mark.parametrize("name", ["mlp", pytest.param("conv2d", marks=pytest.mark.slow)])
def test_sampled_factors_have_the_exact_ones_as_expectation(name):
    network = named(name)
    exact = blocks(backend(AutogradGGN, network), network)
    sampled = backend(AutogradGGN, network, stochastic=True, generator=torch.Generator().manual_seed(0))
    draws = [blocks(sampled, network) for _ in range(400)]
    for key, sides in exact.items():
        assert_mean_is(torch.stack([draw[key][0] for draw in draws]), sides[0], key)
        if len(sides) == 2:
            assert_close(draws[0][key][1], sides[1])


@pytest.mark.parametrize("name", ["conv2d", "encoder", "embedding", "masked_rows"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_factors_do_not_depend_on_how_data_are_batched(name):
    network = named(name)
    (x, y), engine = network.data(), backend(AutogradGGN, network)
    whole = engine.kron(x, y, N=1)[1]
    parts = engine.kron(x[:2], y[:2], N=1)[1] + engine.kron(x[2:], y[2:], N=1)[1]
    assert parts.counts == whole.counts
    for ours, theirs in zip(parts.kfacs, whole.kfacs, strict=True):
        for first, second in zip(ours, theirs, strict=True):
            assert_close(first, second)


def test_masked_data_do_not_count():
    network = named("masked_rows")
    (x, y), engine = network.data(), backend(AutogradGGN, network)
    kept = y != -100
    assert 0 < int(kept.sum()) < len(y)
    masked, alone = engine.kron(x, y, N=1)[1], engine.kron(x[kept], y[kept], N=1)[1]
    assert masked.counts == alone.counts
    assert_close(masked.to_matrix(), alone.to_matrix())


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_a_transposed_convolution_belong_to_its_inputs(groups, reduce):
    """Its weight is [groups · I, O]: A is over all inputs, and the outputs of each group are data of G."""
    model = nn.Sequential(nn.ConvTranspose1d(4, 8, 3, groups=groups, bias=False), nn.Flatten()).double()
    x = torch.randn(5, 4, 2, dtype=torch.float64)
    y = torch.zeros(5, 32, dtype=torch.float64)
    options = {"kfac_approx": "reduce"} if reduce else {}
    G, A = 0.0, 0.0
    for datum in x:
        a = datum.T  # [positions, 4]
        g = torch.zeros(32, 2, groups, 8 // groups, 3, dtype=torch.float64)
        for position in range(2):
            for group in range(groups):
                for o in range(8 // groups):
                    for k in range(3):
                        channel = group * (8 // groups) + o
                        g[channel * 4 + position + k, position, group, o, k] = 1.0
        g = g.flatten(3)  # [outputs, positions, groups, O]
        if reduce:
            a, g = a.mean(0, keepdim=True), g.sum(1, keepdim=True)
        A = A + a.T @ a
        G = G + torch.einsum("ctgo,ctgp->op", g, g)
    n_rows = 5 * (1 if reduce else 2) * groups
    la = Laplace(model, "regression", "all", "kron", backend_kwargs=options)
    la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    assert_close(la.H.to_matrix(), torch.kron(A / n_rows, G))
    ekfac = Laplace(model, "regression", "all", "ekfac", backend_kwargs=options)
    ekfac.fit([(x, y)])
    exact = Laplace(model, "regression", "all", "full")
    exact.fit([(x, y)])
    errors = [(la_.posterior_precision.to_matrix() - exact.posterior_precision).norm() for la_ in (la, ekfac)]
    assert errors[1] <= errors[0]
    half = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"0.weight": w}, (x[:1],))[0], model[0].weight
    ).flatten(1)
    assert_close(la(x[:1])[1][0], half @ la.posterior_precision.to_matrix().inverse() @ half.T)
