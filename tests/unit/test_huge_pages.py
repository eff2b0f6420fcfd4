"""Memory in large pages: tensors like any others, side by side."""

import io

import torch

from litgpt.devices.huge_pages import LINE, PAGE, Pages


def test_tensors_are_apart_and_their_own():
    shapes = [((700, 1001), torch.bfloat16), ((), torch.int64), ((3, 0), torch.float32), ((1_000_003,), torch.uint8)]
    pages = Pages(torch.empty(shape, dtype=dtype, device="meta").nbytes for shape, dtype in shapes)
    tensors = [pages.empty(torch.Size(shape), dtype, "cpu") for shape, dtype in shapes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert (tensor == number).all()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    begin = tensors[0].data_ptr()
    assert begin % PAGE == 0
    assert tensors[1].data_ptr() == begin + -(-tensors[0].nbytes // LINE) * LINE
    del pages, tensors[1:]
    assert (tensors[0] == 0).all()
    file = io.BytesIO()
    torch.save(tensors[0], file)
    assert file.tell() < tensors[0].nbytes + 4096


def test_what_finds_no_room_is_elsewhere():
    pages = Pages([PAGE])
    first, second = (pages.empty(torch.Size([PAGE]), torch.uint8, "cpu") for _ in range(2))
    assert first.fill_(1).sum() + second.fill_(2).sum() == 3 * PAGE
    assert Pages([100]).empty(torch.Size([25]), torch.float32, "cpu").numel() == 25
    assert Pages([PAGE]).empty(torch.Size([PAGE]), torch.uint8, "meta").is_meta
