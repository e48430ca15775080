"""The plan: what it decides from a problem alone, and that its blocks fit what it promises."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cce_cupy.compiler import serves
from cce_cupy.plan import (
    COLUMN_CHUNK,
    LARGEST_AUTO_EPS,
    ROW_TILE,
    TILE_COLUMNS,
    GpuDevice,
    Sweep,
    make_gpu_plan,
    make_plan,
)
from cce_cupy.plan.dense import (
    Blocks,
    DenseParts,
    DenseSizes,
    chunks_cost,
    cut_parts,
    longest_of_products,
)
from cce_cupy.plan.hopper import cut_units, group_rows
from cce_cupy.problem import ArraySpec, Options, Problem

H100, A100 = GpuDevice(132, (9, 0)), GpuDevice(132, (8, 0))


def problem(tokens: int = 1024, dim: int = 64, vocab: int = 65536, dtype="float32", **options):
    arrays = {
        "e": ArraySpec((tokens, dim), dtype),
        "c": ArraySpec((vocab, dim), dtype),
        "targets": ArraySpec((tokens,), "int64"),
    }
    return Problem.check(arrays, Options(**options))


@pytest.mark.parametrize("dim", [0, 1, 7, 640, 4096, 100_000])
@pytest.mark.parametrize("vocab", [0, 1, 31, 65536, 262144])
@pytest.mark.parametrize("tokens", [0, 1, 128, 5000])
def test_blocks_are_whole_tiles_and_chunks(tokens, vocab, dim):
    plan = make_plan(problem(tokens, dim, vocab, "bfloat16"))
    assert plan.row_block % ROW_TILE == 0
    assert plan.stored_rows % ROW_TILE == 0
    assert plan.stored_rows <= min(dim, plan.row_block)
    for columns in (plan.column_block, plan.column_range, plan.gather_block):
        assert columns > 0
        assert columns % COLUMN_CHUNK == 0
    assert plan.segments >= 1
    assert plan.concurrency >= 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_workspace_changes_memory_and_no_block(dtype):
    small = make_plan(problem(dtype=dtype, workspace_bytes=32 * 2**20))
    large = make_plan(problem(dtype=dtype, workspace_bytes=2**30))
    memory = ("workspace_bytes", "concurrency", "sweeps")
    same = dict.fromkeys(memory)
    assert dataclasses.replace(small, **same) == dataclasses.replace(large, **same)
    assert small.workspace_bytes <= 32 * 2**20
    assert large.workspace_bytes <= 2**30
    assert small.concurrency < large.concurrency


def test_too_small_a_workspace_names_the_least():
    with pytest.raises(ValueError, match="workspace_bytes must be at least") as caught:
        make_plan(problem(workspace_bytes=1000))
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert make_plan(problem(workspace_bytes=least)).workspace_bytes == least
    with pytest.raises(ValueError, match="workspace_bytes"):
        make_plan(problem(workspace_bytes=least - 1))


def test_default_workspace_holds_for_the_usual_sizes():
    for dim, vocab in [(640, 262144), (2304, 256000), (4096, 131072), (8192, 128256)]:
        for dtype in ("float32", "bfloat16"):
            plan = make_plan(problem(8192, dim, vocab, dtype))
            assert plan.workspace_bytes <= 128 * 2**20, (dim, vocab, dtype)


@pytest.mark.parametrize(
    ("dtype", "gradient_filter", "vocab", "eps"),
    [
        ("bfloat16", "unbiased", 262144, 2.0**-14),
        ("bfloat16", "threshold", 262144, 2.0**-18),
        ("float16", "unbiased", 65536, 2.0**-15),
        ("float16", "threshold", 65536, 2.0**-19),
        ("bfloat16", "unbiased", 100, LARGEST_AUTO_EPS),
    ],
)
def test_auto_eps(dtype, gradient_filter, vocab, eps):
    plan = make_plan(problem(vocab=vocab, dtype=dtype, gradient_filter=gradient_filter))
    assert (plan.gradient_filter, plan.filter_eps) == (gradient_filter, eps)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gradient_filter": None, "filter_eps": 0.1}, "gradient_filter=None"),
        ({"filter_eps": None}, "filter_eps"),
        ({"filter_eps": 0}, "filter_eps"),
        ({}, "does not filter float32"),
        ({"filter_eps": 0.1, "softcap": 1.0, "label_smoothing": 0.1}, "label smoothing"),
        ({"filter_eps": 0.1, "filter_e_grad": False, "filter_c_grad": False}, "filter_e_grad"),
    ],
)
def test_filter_is_off_and_says_why(options, reason):
    plan = make_plan(problem(**options))
    assert plan.gradient_filter is None
    assert plan.filter_eps == 0.0
    assert reason in plan.filter_reason
    assert plan.sweeps == (Sweep(True, True, filtered=False),)


def test_one_side_unfiltered_takes_two_sweeps():
    plan = make_plan(problem(filter_eps=0.1, filter_e_grad=False))
    assert plan.sweeps == (Sweep(True, False, False), Sweep(False, True, True))
    plan = make_plan(problem(filter_eps=0.1, filter_c_grad=False))
    assert plan.sweeps == (Sweep(True, False, True), Sweep(False, True, False))


def test_sums_of_narrow_dtypes_take_a_second_sweep_where_they_do_not_fit():
    many = 2**20
    assert len(make_plan(problem(many, dtype="bfloat16")).sweeps) == 2
    assert len(make_plan(problem(many, dtype="bfloat16", workspace_bytes=2**30)).sweeps) == 1
    # float32 sums in its outputs.
    assert len(make_plan(problem(many, dtype="float32")).sweeps) == 1


def test_gpu_workspace_is_kept():
    for tokens in (1, 8192, 400_000, 10**7):
        for dim in (1, 640, 4096):
            for vocab in (1, 49152, 262144):
                for given in (2**25, None, 2**28):
                    plan = make_gpu_plan(problem(tokens, dim, vocab, workspace_bytes=given), H100)
                    per_token = ("factor_softmax", "factor_onehot", "factor_smoothing")
                    taken = sum(n for name, n in plan.backward.items() if name not in per_token)
                    assert taken <= (given or 2**27) + 2**10, (tokens, dim, vocab, given)
                    columns = -(-vocab // 128) * 128
                    assert 0 < plan.range_columns <= columns
                    assert plan.part_tiles > 0


def test_portable_backward_of_usual_sizes_is_one_sweep_in_wide_ranges():
    for dim, vocab in ((2304, 256000), (4096, 131072), (640, 262144)):
        plan = make_gpu_plan(problem(8192, dim, vocab, "bfloat16", workspace_bytes=2**28), A100)
        assert plan.hopper_backward is None
        assert plan.part_tiles == plan.tiles == 64
        assert plan.range_columns >= 1024
        assert len(plan.sweeps) == 1


def test_gpu_workspace_that_cannot_suffice_is_refused():
    with pytest.raises(ValueError, match="workspace_bytes must be at least") as caught:
        make_gpu_plan(problem(workspace_bytes=1), H100)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    make_gpu_plan(problem(workspace_bytes=least), H100)
    with pytest.raises(ValueError, match=str(least)):
        make_gpu_plan(problem(workspace_bytes=least - 1), H100)


@pytest.mark.parametrize("tiles", [1, 7, 32, 64, 100, 132])
def test_gpu_segments_fill_the_device(tiles):
    plan = make_gpu_plan(problem(128 * tiles, 64, 262144), H100)
    blocks = tiles * plan.segments
    waves = -(-blocks // 264)
    assert blocks / (264 * waves) >= 0.85


@pytest.mark.parametrize("tiles", [200, 300, 5000])
def test_gpu_segments_of_many_rows_are_few(tiles):
    """Each takes sums of its own for every row."""
    assert make_gpu_plan(problem(128 * tiles, 64, 262144), H100).segments <= 2


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"dim": 640, "gradient_filter": None}, 640),
        ({"dim": 4096}, 512),
        ({"dim": 127}, 0),
        ({"dim": 640, "dtype": "bfloat16", "gradient_filter": None}, 0),
        ({"dim": 640, "filter_eps": 0.1}, 0),
    ],
)
def test_rows_are_stored_where_dc_has_room_and_is_not_rounded_or_filtered(options, rows):
    assert make_plan(problem(**options)).stored_rows == rows


@pytest.mark.parametrize(
    ("options", "stores"),
    [
        ({"filter_eps": 0.1}, True),
        ({"filter_eps": 0.1, "dim": 640, "dtype": "float64"}, True),
        ({}, False),
        ({"filter_eps": 0.1, "dtype": "bfloat16"}, False),
        ({"filter_eps": 0.1, "softcap": 30.0}, False),
        ({"filter_eps": 0.1, "filter_e_grad": False}, False),
    ],
)
def test_kept_columns_are_stored_where_both_gradients_are_filtered(options, stores):
    plan = make_plan(problem(**options))
    assert plan.stores_columns == stores
    assert plan.column_range % plan.column_block == 0


HALF = ("bfloat16", "float16")


def test_hopper_serves_what_its_copies_can_reach():
    def tier(*sizes, device=H100, aligned=True):
        plan = make_gpu_plan(problem(*sizes), device, aligned=aligned)
        assert (plan.tier == "sm90") == (plan.hopper is not None) == (plan.tier_reason == "")
        return plan.tier, plan.tier_reason

    for dtype in HALF:
        assert tier(1024, 64, 5000, dtype) == ("sm90", "")
        assert "16 bytes" in tier(1024, 60, 5000, dtype)[1]
        assert "16 bytes" in tier(1024, 64, 5000, dtype, aligned=False)[1]
        assert "8.9 is not 9.0" in tier(1024, 64, 5000, dtype, device=GpuDevice(132, (8, 9)))[1]
        assert "12.0 is not 9.0" in tier(1024, 64, 5000, dtype, device=GpuDevice(132, (12, 0)))[1]
        assert tier(0, 64, 5000, dtype)[0] == "portable"
        assert tier(1024, 0, 5000, dtype)[0] == "portable"
    for dtype in ("float32", "float64"):
        assert tier(1024, 64, 5000, dtype) == ("portable", f"{dtype} has no fast matrix unit")


@pytest.mark.parametrize("tokens", [1, 128, 129, 1000, 8192, 65536])
@pytest.mark.parametrize(("dim", "vocab"), [(8, 1), (640, 262144), (2304, 256000), (4096, 131072)])
def test_hopper_units_cover_the_logits_and_fill_the_device(tokens, dim, vocab):
    cut = make_gpu_plan(problem(tokens, dim, vocab, "bfloat16"), H100).hopper
    cluster = 1 if tokens <= ROW_TILE else 2
    assert cut.kernel == ("forward_single" if cluster == 1 else "forward_pairs")
    assert cut.blocks % cluster == 0
    assert cut.blocks <= 132
    tiles, row_blocks = -(-vocab // TILE_COLUMNS), -(-tokens // (ROW_TILE * cluster))
    across = -(-tiles // cut.unit_tiles)
    assert cut.parts == 2 * across
    assert 1 <= cut.group <= row_blocks
    # What the fullest block works through, against an even share.
    clusters = 132 // cluster
    rounds = -(-row_blocks * across // clusters)
    if row_blocks * tiles >= 20 * clusters:
        assert rounds * cut.unit_tiles <= 1.06 * row_blocks * tiles / clusters


def test_hopper_packs_rows_where_they_fit_into_the_workspace():
    for tokens, workspace, rows in (
        (8192, None, 8192),
        (8192, 2**24, 0),
        (2**17, None, 0),
        (5, None, ROW_TILE),
    ):
        given = problem(tokens, 2304, 256000, "bfloat16", workspace_bytes=workspace)
        plan = make_gpu_plan(given, H100)
        assert plan.hopper.packed_rows == rows
        assert plan.forward["packed"] == plan.statistics["packed"] == rows * 2 * 2304


def test_hopper_takes_room_for_statistics_only_with_them():
    plan = make_gpu_plan(problem(8192, 640, 262144, "bfloat16"), H100)
    table = 4 * plan.hopper.parts * 8192
    assert plan.forward["unit_rest"] == plan.statistics["unit_best"] == table
    assert plan.forward.items() <= plan.statistics.items()
    assert "unit_best" not in plan.forward
    # Two numbers for each row and part, and a copy of e: small beside the logits, 4 GiB here.
    assert sum(plan.forward.values()) - 2 * 8192 * 640 <= 2**24


def test_sources_for_hopper_are_compiled_where_the_plan_chooses_them():
    for dtype in ("float64", "float32", *HALF):
        for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
            plan = make_gpu_plan(problem(1024, 64, 5000, dtype), GpuDevice(132, capability))
            assert serves("sm90/forward.cu", dtype, capability) == (plan.tier == "sm90")
            assert serves("portable/forward.cu", dtype, capability)


def apart_from_tokens(plan):
    """Bytes of the backward's workspace besides those of each token, of totals and of counters."""
    names = ("factor_softmax", "factor_onehot", "factor_smoothing", "target_rest", "counters")
    totals = ("classifier_total", "embedding_total", "smoothing_classifier", "smoothing_embedding")
    return sum(n for name, n in plan.backward.items() if name not in names + totals)


def check_hopper_backward(plan, tokens, vocab):
    """Check that all of a cut lies within its pieces, and that its passes cover the rows once."""
    cut, room = plan.hopper_backward, plan.backward
    assert (plan.part_tiles, plan.range_columns) == (0, 0)
    assert cut.room.items() <= room.items()
    assert plan.tiles == -(-tokens // ROW_TILE)
    assert cut.natural_blocks == -(-vocab // 128)
    assert cut.order_blocks >= cut.natural_blocks
    assert 32 * cut.tile_words >= plan.tiles
    assert 0 < cut.pairs <= cut.pairs_in_one
    assert 0 < cut.low_offset <= room["records"]
    assert 2 * ROW_TILE * cut.pairs <= cut.low_offset
    assert list(cut.counters) == sorted(set(cut.counters))
    assert cut.counters[0] == 0
    assert all(start % 8 == 0 for start in cut.counters)
    if plan.gradient_filter is not None:
        assert list(cut.scratch) == sorted(set(cut.scratch))
        assert cut.scratch[0] == 0
        assert cut.scratch[-1] + 4 * cut.order_blocks <= room["records"]
    if cut.attempts:
        # What a pass over all row tiles needs besides is rows of dC that become zeros.
        assert cut.zeros_in_dc
        assert not cut.together
        assert cut.row_tiles < plan.tiles
    launches = passed = int(cut.attempts)
    for sweep in plan.sweeps:
        passes = list(cut.passes(plan.tiles, alone=not sweep.c, filtered=sweep.filtered))
        rows = [tile for part in passes for tile in range(part.first_tile, sum(part[:2]))]
        assert rows == list(range(plan.tiles))
        assert len(passes) == (1 if sweep.c else -(-plan.tiles // cut.row_tiles))
        assert all((part.chunk_blocks == 0) == sweep.filtered for part in passes)
        launches += len(passes)
        passed += len(passes)
        for part in passes:
            may = not sweep.filtered and part.tiles == plan.tiles
            most = 0
            for both, dense in ((False, plan.dense), (True, plan.dense_both)):
                found = plan.dense_cut(sweep, part, both=both)
                assert found == (dense if may else None)
                if found is not None:
                    assert found.chunks[0].first == 0
                    assert sum(found.chunks[-1][:2]) == vocab
                    most = max(most, len(found.chunks))
            launches += most
    assert plan.parts == launches
    assert len(plan.sweeps) == (1 if cut.together else 2)
    # A wanted gradient alone takes no more passes than there are counters for.
    most = max(passed, -(-plan.tiles // cut.row_tiles))
    assert room["counters"] >= 8 + most * cut.counters[-1]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("dim", "vocab"), [(640, 262144), (2304, 256000)])
@pytest.mark.parametrize("given", [None, 2**28])
def test_hopper_backward_of_usual_sizes_is_one_pass(dim, vocab, given, dtype):
    plan = make_gpu_plan(problem(8192, dim, vocab, dtype, workspace_bytes=given), H100)
    assert plan.hopper_backward.together
    assert plan.parts == 1
    assert apart_from_tokens(plan) <= (given or 2**27) + 2**20
    check_hopper_backward(plan, 8192, vocab)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_filter": None}, {"filter_e_grad": False}, {"label_smoothing": 0.1}]
)
def test_hopper_backward_keeps_its_workspace(options):
    seen = set()
    for tokens in (1, 300, 8192, 131072, 131073):
        for dim in (8, 640, 4096):
            for vocab in (1, 500, 49152, 262144):
                for given in (2**20, 2**22, 2**25, None, 2**28):
                    asked = problem(
                        tokens, dim, vocab, "bfloat16", workspace_bytes=given, **options
                    )
                    try:
                        plan = make_gpu_plan(asked, H100)
                    except ValueError:
                        continue
                    assert plan.tier == "sm90"
                    cut = plan.hopper_backward
                    if cut is None:
                        assert plan.range_columns > 0
                        assert plan.part_tiles > 0
                        seen.add(None)
                        continue
                    assert sum(cut.room.values()) <= (given or 2**27), asked
                    assert apart_from_tokens(plan) <= (given or 2**27) + 2**12, asked
                    check_hopper_backward(plan, tokens, vocab)
                    seen.add((cut.row_tiles < plan.tiles, cut.attempts))
    # Both gradients of kept columns, and rows of dC that become zeros.
    assert seen == {None, (False, False), (True, options == {})}


def test_backward_is_portable_where_hopper_has_no_room_for_it():
    def plan(tokens, dtype, device=H100, **options):
        found = make_gpu_plan(problem(tokens, 640, 262144, dtype, **options), device)
        if found.hopper_backward is None:
            assert found.range_columns > 0
            assert found.part_tiles > 0
            assert found.parts > 1
        return found

    for dtype in HALF:
        for tokens, vocab in itertools.product((1, 128, 300), (1, 256, 5000)):
            least = make_gpu_plan(problem(tokens, 64, vocab, dtype), H100)
            assert least.hopper_backward is not None
            check_hopper_backward(least, tokens, vocab)
        small = plan(8192, dtype, workspace_bytes=2**22)
        assert (small.tier, small.hopper_backward) == ("sm90", None)
        # What sorts the columns of one row tile does not fit, though their records would.
        assert plan(128, dtype, workspace_bytes=2**22).hopper_backward is None
        most = 1024 * ROW_TILE
        assert plan(most, dtype, workspace_bytes=2**29).hopper_backward is not None
        assert plan(most + 1, dtype, workspace_bytes=2**29).hopper_backward is None
        assert plan(8192, dtype, device=A100).hopper_backward is None
    for dtype in ("float32", "float64"):
        for given in (None, 2**30):
            assert plan(8192, dtype, workspace_bytes=given).hopper_backward is None


def cut_as_the_device_does(cut, kept):
    """Yield the blocks of each chunk, and its room: as cut_chunks of kernels_cu/sm90/order.cu."""
    row_tiles, blocks = kept.shape
    before = np.r_[0, np.cumsum(kept.sum(axis=0))]
    padding = row_tiles * 15
    in_one = cut.pairs == cut.pairs_in_one or before[-1] + padding <= cut.pairs_in_one
    first = 0
    while first < blocks:
        last = first + 1
        limit = before[first] + cut.pairs - padding
        while last < blocks and (in_one or before[last + 1] <= limit):
            last += 1
        yield slice(first, last), cut.pairs_in_one if in_one else cut.pairs
        first = last


@pytest.mark.parametrize("given", [2**23, 2**25, None, 2**28])
@pytest.mark.parametrize("tokens", [128, 5000, 8192, 65536])
def test_what_the_device_cuts_fits(tokens, given):
    """The host makes room before anyone knows how many columns are kept."""
    rng = np.random.default_rng(tokens)
    for dim, vocab in ((64, 1000), (640, 262144), (4096, 20000)):
        plan = make_gpu_plan(problem(tokens, dim, vocab, "bfloat16", workspace_bytes=given), H100)
        cut = plan.hopper_backward
        if cut is None:
            continue
        assert cut.pairs == cut.pairs_in_one or cut.pairs * 256 <= cut.low_offset
        width = np.minimum(128, vocab - 128 * np.arange(cut.natural_blocks))
        for density in (0.0, 0.05, 1.0, rng.random(cut.natural_blocks).round()):
            kept = rng.binomial(width, np.broadcast_to(density, (plan.tiles, len(width))))
            chunks = 0
            for blocks, room in cut_as_the_device_does(cut, kept):
                pairs = kept[:, blocks].sum(axis=1)
                lists = -(-pairs // 16) * 16
                assert lists.sum() <= room
                assert 4 * (lists + 16).sum() <= plan.backward["passing"]
                assert 4 * (-(-pairs // 256)).sum() <= plan.backward["item"]
                chunks += 1
            assert chunks <= cut.order_blocks - cut.natural_blocks
        for alone in (False, True):
            for part in cut.passes(plan.tiles, alone=alone, filtered=False):
                columns = min(part.chunk_blocks * 128, vocab)
                whole = part.chunk_blocks >= cut.natural_blocks
                assert part.chunk_blocks > 0
                lists = part.tiles * (-(-columns // 16) * 16)
                assert lists <= (cut.pairs_in_one if whole else cut.pairs)


UNFILTERED = {"gradient_filter": None}


def check_dense(plan, dense, tokens, vocab, dim):
    """Check that dz of a chunk and unfinished sums lie apart within the records; count chunks."""
    cut = plan.hopper_backward
    assert dense.width % 128 == 0
    assert dense.blocks == 132
    row_pairs, end = -(-tokens // 256), 0
    assert 1 <= dense.group <= row_pairs
    for chunk in dense.chunks:
        assert chunk.first == end
        assert 0 < chunk.columns <= dense.width
        assert 1 <= chunk.unit_tiles <= -(-chunk.columns // TILE_COLUMNS)
        end += chunk.columns
    assert end == vocab
    # All but the last are of one size, of whole blocks.
    assert len({chunk.columns for chunk in dense.chunks[:-1]}) <= 1
    assert all(chunk.columns % 128 == 0 for chunk in dense.chunks[:-1])
    chunks, last = len(dense.chunks), dense.chunks[-1].columns
    dz = tokens * dense.width * 2
    assert dz <= plan.backward["records"]
    # Rows of dC where sums wait are of the last chunk; with one chunk nothing waits.
    assert 0 <= dense.waiting <= min(tokens, last if chunks > 1 else 0)
    # dE of fewer row tiles than all is not formed from dense products.
    if chunks > 1 and cut.row_tiles == plan.tiles:
        assert dz <= dense.low_offset
        waiting = 2 * (tokens - dense.waiting) * dim
        assert dense.low_offset + waiting <= plan.backward["records"]
    return chunks


def cost_of(dense, sizes):
    """What the plan's choice of chunks costs by its own account."""
    first, last = dense.chunks[0].columns, dense.chunks[-1].columns
    blocks = Blocks(len(dense.chunks), -(-first // 128), -(-last // 128))
    return chunks_cost(sizes, blocks, dense.parts, apart=dense.waiting > 0)


def least_cost(sizes, blocks, *, apart=False):
    """What chunks cost by the same account, D cut as is best."""
    return min(chunks_cost(sizes, blocks, parts, apart=apart) for parts in cut_parts(sizes.dim))


def in_even_chunks(blocks, most):
    """Blocks of 128 columns in as few chunks as there can be, as even as can be."""
    chunks = -(-blocks // most)
    each = -(-blocks // chunks)
    return Blocks(-(-blocks // each), each, blocks - (-(-blocks // each) - 1) * each)


def in_even_chunks_with_sums(plan, sizes):
    """The same where unfinished sums of dE that find no place in the last rows of dC fit too.

    And whether any are in these.
    """
    blocks, room = -(-sizes.vocab // 128), plan.hopper_backward.record_bytes
    for chunks in range(1, blocks + 1):
        found = in_even_chunks(blocks, -(-blocks // chunks))
        last = sizes.vocab - (found.chunks - 1) * found.each * 128
        dz = 2 * sizes.tokens * found.each * 128
        if found.chunks == 1 or dz + 2 * sizes.dim * sizes.tokens <= room:
            low, waits = 0, False
        else:
            low, waits = 2 * sizes.dim * max(sizes.tokens - last, 0), True
        if dz + low <= room:
            return found, waits
    raise AssertionError("there is no room")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("tokens", "dim", "vocab", "given"),
    [(4352, 64, 13000, None), (4096, 512, 7000, None), (8192, 64, 16000, 2**30)],
)
def test_dense_chunks_without_room_for_unfinished_sums_are_one(tokens, dim, vocab, given, dtype):
    """The work of two would be dealt out more evenly."""
    asked = problem(tokens, dim, vocab, dtype, workspace_bytes=given, **UNFILTERED)
    plan = make_gpu_plan(asked, H100)
    assert plan.hopper_backward.low_offset == plan.backward["records"]
    assert check_dense(plan, plan.dense, tokens, vocab, dim) == 1
    assert check_dense(plan, plan.dense_both, tokens, vocab, dim) == 1


@pytest.mark.parametrize("given", [300_000, 2**20, 2**21, 2**24, 2**26, None, 2**28, 2**31])
@pytest.mark.parametrize("vocab", [1, 127, 500, 5000, 32000, 128256, 500_000])
@pytest.mark.parametrize(
    "options", [UNFILTERED, {"filter_e_grad": False}, {"filter_c_grad": False}]
)
def test_dense_chunks_fit_and_are_no_worse_than_the_largest(vocab, given, options):
    for tokens in (1, 128, 129, 1000, 4352, 8192, 65536):
        for dim in (8, 640, 2304, 8192):
            asked = problem(tokens, dim, vocab, "bfloat16", workspace_bytes=given, **options)
            try:
                plan = make_gpu_plan(asked, H100)
            except ValueError:
                continue
            if plan.dense is None:
                cut = plan.hopper_backward
                assert cut is None or cut.chunk_blocks(plan.tiles) == 0
                continue
            assert plan.dense.waiting == 0
            chunks = check_dense(plan, plan.dense, tokens, vocab, dim)
            most = plan.hopper_backward.chunk_blocks(plan.tiles)
            # No more than half as many again as there must be.
            assert chunks <= 1.5 * -(-vocab // (128 * most)) + 1
            sizes = DenseSizes(tokens, vocab, dim, 2, H100.processors)
            cost, blocks = cost_of(plan.dense, sizes), -(-vocab // 128)
            # Costs within half a percent count as the same: fewer chunks are preferred.
            assert cost <= 1.005 * least_cost(sizes, in_even_chunks(blocks, most))
            if plan.dense_both is not None:
                assert plan.hopper_backward.together
                check_dense(plan, plan.dense_both, tokens, vocab, dim)
                even, waits = in_even_chunks_with_sums(plan, sizes)
                cost = least_cost(sizes, even, apart=waits)
                assert cost_of(plan.dense_both, sizes) <= 1.005 * cost


@hypothesis.given(dim=st.integers(1, 20_000))
def test_parts_cover_the_elements_and_no_more(dim):
    ways = cut_parts(dim)
    assert len(ways) == len(set(ways)) <= 2
    for parts in ways:
        before_last = 256 * (parts.number - 1) + 64 * min(parts.wide, parts.number - 1)
        last = 320 if parts.wide == parts.number else 256
        assert before_last < dim <= before_last + last
        assert len(parts.shares(dim)) == parts.number
    # The fewest that there can be, each of 320 elements at most.
    assert min(parts.number for parts in ways) == -(-dim // 320)


def test_wide_parts_are_for_fewer():
    assert cut_parts(576) == [DenseParts(2, 1), DenseParts(3, 0)]
    assert cut_parts(640) == [DenseParts(2, 2), DenseParts(3, 0)]
    assert cut_parts(2304) == [DenseParts(8, 4), DenseParts(9, 0)]
    assert cut_parts(512) == [DenseParts(2, 0)]
    # The last of 2 is of 128 elements and takes less than a whole one, though more than half.
    assert cut_parts(384) == [DenseParts(2, 0)]
    first, last = DenseParts(2, 0).shares(384)
    assert first == 1
    assert 0.5 < last < 1


def test_sums_wait_in_dc_only_where_they_have_no_room_beside_dz():
    def waiting(given):
        asked = problem(8192, 576, 49152, "bfloat16", workspace_bytes=given, **UNFILTERED)
        return make_gpu_plan(asked, H100).dense_both.waiting

    # One chunk takes 768 MiB; then sums of 9 MiB beside dz, in rows of dC, or in both.
    assert waiting(2**30) == 0
    assert waiting(2**29) == 0
    assert waiting(2**27) > 0


def test_pairs_of_blocks_take_narrow_parts_in_turn():
    # Two rounds: each of the two pairs has a whole part in one and a half in the other.
    assert longest_of_products(2, [4, 4], [1.0, 0.5]) == 6
    assert longest_of_products(2, [4, 2], [1.0, 0.5]) == 5
    # All of it in one round, and a pair that has all of it.
    assert longest_of_products(8, [4, 3], [1.0, 1.0, 0.5]) == 4
    assert longest_of_products(1, [4, 3], [1.0, 0.5]) == 10.5


def test_dense_products_are_for_all_columns_without_bias_and_smoothing():
    def dense(tokens=1024, dim=64, device=H100, bias=False, **options):
        asked = problem(tokens, dim, 5000, "bfloat16", **options)
        if bias:
            asked = dataclasses.replace(asked, has_bias=True)
        return make_gpu_plan(asked, device).dense is not None

    assert dense(**UNFILTERED)
    assert dense(**UNFILTERED, softcap=30.0, logit_scale=0.5, z_loss=1e-3)
    assert dense(filter_e_grad=False)
    assert dense(filter_c_grad=False)
    assert dense(filter_e_grad=False, filter_c_grad=False)
    assert not dense()
    assert not dense(gradient_filter="threshold")
    for options in (UNFILTERED, {"filter_e_grad": False}, {"filter_c_grad": False}):
        assert not dense(**options, bias=True)
        assert not dense(**options, label_smoothing=0.1)
        assert not dense(**options, device=A100)
        assert not dense(**options, dim=63)
        assert not dense(1025 * ROW_TILE, **options, workspace_bytes=2**29)


@pytest.mark.parametrize("row_blocks", [1, 5, 16, 66, 67, 512])
@pytest.mark.parametrize("tiles", [1, 25, 67, 1366, 10**5])
@pytest.mark.parametrize("clusters", [1, 66])
def test_units_are_no_longer_than_they_need_be(row_blocks, tiles, clusters):
    def rounds(unit_tiles):
        return -(-row_blocks * -(-tiles // unit_tiles) // clusters)

    unit_tiles = cut_units(row_blocks, tiles, clusters)
    group = group_rows(row_blocks, 256 * 640 * 2)
    longest = max(24, -(-tiles // clusters))
    assert 1 <= unit_tiles <= min(longest, tiles)
    assert 1 <= group <= row_blocks
    # The groups are alike, and their rows of e stay in the cache.
    assert group == -(-row_blocks // -(-row_blocks // group))
    assert group * 256 * 640 * 2 <= 20 * 10**6
    each = rounds(unit_tiles) * unit_tiles
    assert each <= min(rounds(n) * (n + 0.05) for n in range(1, min(longest, tiles) + 1))
    assert each * clusters >= row_blocks * tiles
