import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.numerics.packing import pack, packed_length, unpack

WIDTHS = range(1, 9)
LENGTHS = [1, 5, 31, 32, 33, 64, 100]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)


def bits_of(words: list[int]) -> str:
    """The stream as a string, its first bit first."""
    return "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in words)


def unpack_by_hand(words: list[int], bits: int, length: int) -> list[int]:
    stream = bits_of(words)
    return [int(stream[i * bits : (i + 1) * bits][::-1], 2) for i in range(length)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
class TestEveryWidthAndLength:
    def test_an_independent_reader_of_the_bit_stream_finds_the_codes(self, bits, length):
        codes = random_codes(bits, length)
        assert unpack_by_hand(pack(codes, bits).tolist(), bits, length) == codes.tolist()

    def test_words_are_as_few_as_possible_and_padded_with_zeros(self, bits, length):
        words = pack(torch.full((length,), 2**bits - 1), bits)
        assert words.dtype == torch.int32
        assert words.shape == (packed_length(length, bits),) == (-(-length * bits // 32),)
        stream = bits_of(words.tolist())
        assert stream == "1" * (length * bits) + "0" * (len(stream) - length * bits)

    def test_unpack_undoes_pack(self, bits, length):
        codes = random_codes(bits, length)
        unpacked = unpack(pack(codes, bits), bits, length)
        assert unpacked.dtype == torch.uint8
        assert torch.equal(unpacked, codes)


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), min_size=1))))
@settings(max_examples=50, deadline=None)
def test_any_codes_survive(case):
    bits, codes = case
    words = pack(torch.tensor(codes), bits)
    assert unpack_by_hand(words.tolist(), bits, len(codes)) == codes
    assert unpack(words, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_packed_each_for_itself_whatever_the_leading_axes(bits):
    codes = random_codes(bits, 2, 3, 37)
    words = pack(codes, bits)
    assert words.shape == (2, 3, packed_length(37, bits))
    for i in range(2):
        for j in range(3):
            assert torch.equal(words[i, j], pack(codes[i, j], bits))
    assert torch.equal(unpack(words, bits, 37), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_integer_dtype_of_the_codes_does_not_matter(bits, dtype):
    codes = random_codes(bits, 40)
    assert torch.equal(pack(codes.to(dtype), bits), pack(codes, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_that_do_not_fit_are_refused(bits):
    with pytest.raises(ValueError, match=f"packed in {bits} bits"):
        pack(torch.tensor([0, 2**bits]), bits)
    with pytest.raises(ValueError, match=f"packed in {bits} bits"):
        pack(torch.tensor([0, -1]), bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_widths_outside_1_to_8_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.tensor([0]), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(torch.tensor([0], dtype=torch.int32), bits, 1)


@pytest.mark.parametrize("words", [1, 3])
def test_a_wrong_number_of_words_is_refused(words):
    with pytest.raises(ValueError, match=f"need 2 words, not {words}"):
        unpack(torch.zeros(words, dtype=torch.int32), 4, 16)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", LENGTHS)
def test_compressed_tensors_reads_the_same_codes(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, 3, columns)
    signed = helpers.unpack_from_int32(pack(codes, bits), bits, torch.Size((3, columns)))
    assert torch.equal(signed.int() + 2 ** (bits - 1), codes.int())
