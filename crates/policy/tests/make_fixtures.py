"""Makes the reference data of this crate's tests from the libraries that π0 is trained with.

    python -m venv v && v/bin/pip install Pillow numpy torch sentencepiece protobuf
    v/bin/python make_fixtures.py data

Made with Pillow 13.0.0, torch 2.15.0 (CPU) and sentencepiece 0.2.3.

resize.bin     images of `pattern()` resized by Pillow (BILINEAR) and torch (bilinear, align_corners=False)
tiny.*         a tokenizer of 300 entries in both file formats, and what sentencepiece makes of some prompts
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

OUT = Path(sys.argv[1])

# height, width -> height, width: down, up, both, along one axis only. torch takes another kernel, which rounds
# otherwise, where the sides of the result add up to 128 or less; real images never do. Pillow 13
# was seen to shrink columns before rows in some cases, of letterboxes when an image is more than twice as tall
# as wide; no camera is.
SIZES = [(90, 200, 15, 115), (10, 53, 11, 118), (9, 300, 5, 140), (17, 300, 11, 130), (5, 40, 6, 135), (8, 200, 8, 122)]


def pattern(height, width):
    """Noise that Rust repeats: a 32-bit linear congruential generator, its top byte."""
    out, x = np.empty(height * width * 3, np.uint8), 12345
    for i in range(out.size):
        x = (x * 1664525 + 1013904223) % 2**32
        out[i] = x >> 24
    return out.reshape(height, width, 3)


def resize():
    data = bytearray()
    for h, w, to_h, to_w in SIZES:
        image = pattern(h, w)
        pillow = np.asarray(Image.fromarray(image).resize((to_w, to_h), resample=Image.BILINEAR))
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().to(torch.float32) / 255
        smooth = torch.nn.functional.interpolate(planes, size=(to_h, to_w), mode="bilinear", align_corners=False)
        data += struct.pack("<4I", h, w, to_h, to_w)
        data += pillow.tobytes()
        data += smooth[0].numpy().astype("<f4").tobytes()  # [3, to_h, to_w]
    (OUT / "resize.bin").write_bytes(bytes(data))


# --- a small vocabulary, laid out like PaliGemma's where it matters ---

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
MERGES = ["th", "▁th", "▁the", "in", "an", "▁p", "ck", "▁t", "er", "on", "▁f", "ick"]


def vocabulary():
    """Piece -> id: PAD 0, EOS 1, BOS 2, UNK 3, merges, letters, newline at 108 as in PaliGemma, bytes."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *MERGES, "▁", *LETTERS]
    raw = [f"<0x{b:02X}>" for b in range(256)]
    split = 108 - len(pieces)
    pieces += raw[:split] + ["\n"] + raw[split:]
    assert pieces[108] == "\n" and len(pieces) == len(set(pieces)) <= 300, len(pieces)
    return {piece: i for i, piece in enumerate(pieces)}


def halves(piece):
    """The two pieces that merge into this one: the split whose parts exist."""
    known = set(MERGES) | set(LETTERS) | {"▁"}
    (pair,) = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in known and piece[i:] in known][:1]
    return list(pair)


def tiny_json(vocab):
    special = [
        {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for piece, i in list(vocab.items())[:4]
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": [halves(m) for m in MERGES],
        },
    }


def tiny_model(vocab):
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto()
    for piece, i in vocab.items():
        kind = pb.ModelProto.SentencePiece
        if piece in ("<pad>", "<eos>", "<bos>"):
            entry = kind(piece=piece, score=0, type=kind.CONTROL)
        elif piece == "<unk>":
            entry = kind(piece=piece, score=0, type=kind.UNKNOWN)
        elif piece.startswith("<0x"):
            entry = kind(piece=piece, score=0, type=kind.BYTE)
        elif piece == "\n":
            entry = kind(piece=piece, score=0, type=kind.USER_DEFINED)
        else:
            entry = kind(piece=piece, score=-float(i), type=kind.NORMAL)
        model.pieces.append(entry)
    t, n = model.trainer_spec, model.normalizer_spec
    t.model_type, t.byte_fallback, t.vocab_size = pb.TrainerSpec.BPE, True, len(vocab)
    t.pad_id, t.eos_id, t.bos_id, t.unk_id = 0, 1, 2, 3
    n.name, n.add_dummy_prefix, n.remove_extra_whitespaces, n.escape_whitespaces = "identity", False, False, True
    return model.SerializeToString()


PROMPTS = [
    "pick up the fork", "transfer cube\n", "the  thick\n\nthing", "", " ", "Größe 中文 🤖", "in the inner tin", "<bos>the<eos>",
    "▁the", "a\tb\0c",
]


def tiny():
    import sentencepiece

    vocab = vocabulary()
    (OUT / "tiny.json").write_text(json.dumps(tiny_json(vocab), ensure_ascii=False, indent=0) + "\n")
    (OUT / "tiny.model").write_bytes(tiny_model(vocab))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(OUT / "tiny.model"))
    ids = [{"text": text, "ids": sp.encode(text)} for text in PROMPTS]
    (OUT / "tiny.prompts.json").write_text("\n".join(["[", ",\n".join(map(json.dumps, ids)), "]"]) + "\n")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    resize()
    tiny()
