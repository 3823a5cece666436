"""pack and unpack against the plain-torch twin; integer results are exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import clado_ext
from clado_ext import _native
from clado_ext.reference import bitpack as oracle
from tests.ops.devices import DEVICES, at_every_cpu_setting, same_bits

BITS = range(2, 9)


def random_codes(shape: tuple[int, ...], bits: int, device: str) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1,), (5, 31), (3, 32), (4, 33), (7, 1), (2, 3, 257), (0, 8), (4, 0), (1, 4096)])
def test_matches_oracle_and_round_trips(shape: tuple[int, ...], bits: int, device: str) -> None:
    codes = random_codes(shape, bits, device)
    packed = clado_ext.pack(codes, bits)
    assert packed.shape[-1] == clado_ext.packed_columns(shape[-1], bits)
    torch.testing.assert_close(packed, oracle.pack(codes, bits), rtol=0, atol=0)
    torch.testing.assert_close(clado_ext.unpack(packed, bits, shape[-1]), codes, rtol=0, atol=0)
    torch.testing.assert_close(oracle.unpack(packed, bits, shape[-1]), codes, rtol=0, atol=0)


@given(rows=st.integers(1, 5), columns=st.integers(1, 200), bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_round_trip_property(rows: int, columns: int, bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = random_codes((rows, columns), bits, "cpu")
    assert torch.equal(clado_ext.unpack(clado_ext.pack(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_same_words_at_every_simd_level_and_thread_count(bits: int) -> None:
    codes = random_codes((9, 1000), bits, "cpu")
    results = at_every_cpu_setting(lambda: clado_ext.pack(codes, bits))
    assert all(same_bits(r, results[0]) for r in results)
    assert all(same_bits(r, codes) for r in at_every_cpu_setting(lambda: clado_ext.unpack(results[0], bits, 1000)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 33), (2, 64), (3, 127), (100, 1056), (3, 65536), (1, 70000)])
def test_every_level_stays_inside_its_rows(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(shape, bits, "cpu")
    words = oracle.pack(codes, bits)

    def run() -> bool:
        packed, back = (
            torch.full((words.numel() + 20,), -77, dtype=torch.int32),
            torch.full((codes.numel() + 80,), 77).char(),
        )
        threads = torch.get_num_threads()
        assert _native.pack_cpu(codes.data_ptr(), packed.data_ptr(), *shape, bits, threads)
        _native.unpack_cpu(packed.data_ptr(), back.data_ptr(), *shape, bits, threads)
        right = torch.equal(packed[:-20], words.reshape(-1)) and torch.equal(back[:-80], codes.reshape(-1))
        return right and bool((packed[-20:] == -77).all() and (back[-80:] == 77).all())

    assert all(at_every_cpu_setting(run))


@pytest.mark.parametrize("bits", range(2, 8))
def test_every_level_sees_a_code_outside(bits: int) -> None:
    half = 2 ** (bits - 1)
    for place in (0, 63, 700, 4999):
        for code in (half, -half - 1):
            codes = random_codes((5000,), bits, "cpu")
            codes[place] = code

            def refused(codes: torch.Tensor = codes) -> bool:
                with pytest.raises(ValueError, match="a code outside"):
                    clado_ext.pack(codes, bits)
                return True

            assert all(at_every_cpu_setting(refused))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_input(device: str) -> None:
    codes = random_codes((64, 6), 4, device).t()
    assert torch.equal(clado_ext.pack(codes, 4), clado_ext.pack(codes.contiguous(), 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1,), (33, 3), (5, 1), (0, 2), (3, 4, 37)])
def test_packs_along_any_dimension(shape: tuple[int, ...], device: str) -> None:
    codes = random_codes(shape, 4, device)
    for dim in range(-len(shape), len(shape)):
        packed = clado_ext.pack(codes, 4, dim)
        assert same_bits(packed, oracle.pack(codes.movedim(dim, -1), 4).movedim(-1, dim).contiguous())
        assert same_bits(clado_ext.unpack(packed, 4, shape[dim], dim), codes)


@pytest.mark.parametrize("device", DEVICES)
def test_op_is_well_formed(device: str) -> None:
    codes = random_codes((3, 40), 3, device)
    torch.library.opcheck(torch.ops.clado.pack.default, (codes, 3))
    torch.library.opcheck(torch.ops.clado.unpack.default, (clado_ext.pack(codes, 3), 3, 40))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_break(device: str) -> None:
    codes = random_codes((3, 40), 5, device)
    round_trip = torch.compile(
        lambda c: clado_ext.unpack(clado_ext.pack(c, 5), 5, 40), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(round_trip(codes), codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clado_ext.pack(torch.zeros(4), 4), "pack: codes must be int8, got torch.float32"),
        (lambda: clado_ext.pack(torch.zeros(4, dtype=torch.int8), 9), "pack: bits must lie in 2..8, got 9"),
        (lambda: clado_ext.pack(torch.tensor(1, dtype=torch.int8), 4), "pack: codes must have at least one dimension"),
        (lambda: clado_ext.pack(torch.zeros(4, dtype=torch.int8), 4, 1), r"pack: dim must lie in -1\.\.0, got 1"),
        (lambda: clado_ext.pack(torch.full((40,), 8, dtype=torch.int8), 4), r"pack: codes must lie in \[-8, 7\]"),
        (
            lambda: clado_ext.unpack(torch.zeros(2, dtype=torch.int32), 4, 40),
            "unpack: packed must have 5 words per row, got 2",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
