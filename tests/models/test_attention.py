import pytest
import torch

from stdit.errors import StditError
from stdit.models import attention
from stdit.models.attention import (
    ATTENTION,
    Call,
    add_extra_key_grads,
    choose_backend,
    merge_extra_keys,
    segment_attention,
)
from stdit.models.packing import Segments

MIXES = [  # query and key lengths of the segments
    ([7], [7]),
    ([5, 5, 5], [5, 5, 5]),
    ([1, 130, 16], [1, 130, 16]),
    ([4, 9, 4, 4], [3, 3, 3, 1]),
    ([4, 4, 9, 9], [2, 2, 6, 6]),
    ([33], [1]),
]


def tensors(q_lengths, k_lengths, dtype=torch.float64, heads=3, d=8):
    torch.manual_seed(0)
    q = torch.randn(sum(q_lengths), heads, d, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), heads, d, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v, Segments.of(q_lengths), Segments.of(k_lengths)


def by_definition(q, k, v, q_segments, k_segments, multiplicity=None):
    """Attention of each segment alone, with each key repeated by its multiplicity."""
    parts = []
    counts = torch.ones(len(k)) if multiplicity is None else multiplicity
    for gq, gk, gv, gn in zip(
        q.split(q_segments.lengths),
        k.split(k_segments.lengths),
        v.split(k_segments.lengths),
        counts.split(k_segments.lengths),
    ):
        gk, gv = (t.repeat_interleave(gn.long(), dim=0) for t in (gk, gv))
        weights = torch.einsum("qhd,khd->hqk", gq, gk).div(gq.shape[-1] ** 0.5).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, gv))
    return torch.cat(parts)


def counts_for(k_lengths):
    """Several keys of a segment may have a multiplicity, not only the last."""
    return torch.tensor([float(1 + (3 * i) % 7) for i in range(sum(k_lengths))])


@pytest.mark.parametrize("backend", ["dense", "naive", "auto"])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("q_lengths", "k_lengths"), MIXES)
def test_backends_equal_the_definition(q_lengths, k_lengths, counted, backend):
    q, k, v, *segments = tensors(q_lengths, k_lengths)
    multiplicity = counts_for(k_lengths) if counted else None
    wanted = by_definition(q, k, v, *segments, multiplicity)
    found = segment_attention(q, k, v, *segments, multiplicity, backend)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), direction), torch.autograd.grad(wanted, (q, k, v), direction)
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes(dtype, tolerance):
    q, k, v, *segments = tensors([4, 9, 4], [3, 3, 5], dtype)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    multiplicity = counts_for([3, 3, 5])
    wanted = by_definition(*wide, *segments, multiplicity)
    found = segment_attention(q, k, v, *segments, multiplicity)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    found.sum().backward()
    wanted.sum().backward()
    for a, b in zip((q, k, v), wide):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance)


def test_a_large_multiplicity_is_exact():
    q, k, v, *segments = tensors([6], [4])
    counts = torch.tensor([1.0, 1.0, 1.0, 509.0])
    found = segment_attention(q, k, v, *segments, counts)
    torch.testing.assert_close(found, by_definition(q, k, v, *segments, counts), rtol=1e-12, atol=1e-12)


def test_scores_written_out_a_few_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 50)
    test_backends_equal_the_definition([4, 9, 4], [3, 3, 3], True, "naive")


def test_gradcheck():
    q, k, v, *segments = tensors([2, 3, 2], [2, 1, 2], heads=1, d=4)
    counts = torch.tensor([1.0, 4.0, 2.0, 1.0, 3.0])
    assert torch.autograd.gradcheck(lambda *t: segment_attention(*t, *segments, counts), (q, k, v))


@pytest.mark.parametrize(("q_lengths", "k_lengths"), MIXES)
def test_merging_log_sum_exps_equals_a_bias(q_lengths, k_lengths):
    """The handling of multiplicity around variable-length kernels, with a kernel written out here."""
    q, k, v, q_segments, k_segments = tensors(q_lengths, k_lengths)
    multiplicity = counts_for(k_lengths)
    wanted = by_definition(q, k, v, q_segments, k_segments, multiplicity)
    grad = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, (q, k, v), grad)

    q, k, v = (t.detach() for t in (q, k, v))
    ends = (q_segments.offsets, k_segments.offsets, q_segments.host, k_segments.host)
    call = Call(q, k, v, multiplicity, *ends)
    out, lse = merge_extra_keys(call, *ATTENTION.compiled(q, k, v, None, *ends, "naive"))
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)

    segment_of = [torch.arange(len(l)).repeat_interleave(torch.tensor(l)) for l in (q_lengths, k_lengths)]
    same = segment_of[0][:, None] == segment_of[1]
    scale = q.shape[-1] ** -0.5
    p = (torch.einsum("qhd,khd->hqk", q, k) * scale - lse.T[..., None]).exp() * same
    dp = torch.einsum("qhd,khd->hqk", grad, v) - (grad * out).sum(-1).T[..., None]
    ds = p * dp * scale
    once = [
        torch.einsum("hqk,khd->qhd", ds, k),
        torch.einsum("hqk,qhd->khd", ds, q),
        torch.einsum("hqk,qhd->khd", p, grad),
    ]
    found = add_extra_key_grads(call, tuple(once), grad, out, lse)
    for a, b in zip(found, wanted_grads):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_opcheck():
    q, k, v, q_segments, k_segments = tensors([4, 9, 4], [3, 2, 3], torch.float32)
    ends = (q_segments.offsets, k_segments.offsets, q_segments.host, k_segments.host)
    torch.library.opcheck(ATTENTION.compiled._opoverload, (q, k, v, counts_for([3, 2, 3]), *ends, "dense"))
    torch.library.opcheck(ATTENTION.compiled._opoverload, (q, k, v, None, *ends, "naive"))


def test_auto_is_dense_on_a_cpu():
    assert choose_backend("auto", "cpu", torch.float32, 64) == "dense"
    assert choose_backend("auto", "cuda", torch.float32, 64) == "dense"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "message"),
    [
        ("varlen", "cpu", torch.bfloat16, 64, "GPU only.*dense, naive"),
        ("flash", "cpu", torch.float32, 64, "GPU only.*dense, naive"),
        ("fast", "cpu", torch.float32, 64, "does not exist.*varlen"),
    ],
)
def test_a_backend_that_cannot_says_which_can(backend, device, dtype, head_dim, message):
    with pytest.raises(StditError, match=message):
        choose_backend(backend, device, dtype, head_dim)


def test_misfitting_segments_are_refused():
    q, k, v, q_segments, k_segments = tensors([4, 2], [3, 3])
    with pytest.raises(StditError, match="do not match"):
        segment_attention(q, k, v, Segments.of([6]), k_segments)
    with pytest.raises(StditError, match="do not match"):
        segment_attention(q, k, v, q_segments, Segments.of([3, 2]))
    with pytest.raises(StditError, match="each key"):
        segment_attention(q, k, v, q_segments, k_segments, torch.ones(5))
    with pytest.raises(StditError, match="1 or more"):
        segment_attention(q, k, v, q_segments, k_segments, torch.zeros(6))
    with pytest.raises(StditError, match="differ"):
        segment_attention(q, k.float(), v, q_segments, k_segments)
