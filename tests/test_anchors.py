"""Anchors: a table written by hand, their order over the grid and the levels, and torchvision's cells."""

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors

from retinanet.anchors import P2_STRIDES, STRIDES, AnchorGenerator, build_anchors, cell_anchors
from retinanet.config import AnchorConfig

SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)


def test_cell_anchors_are_ratio_major() -> None:
    # ratio r = height / width at equal area: width = size * scale / sqrt(r), height = size * scale * sqrt(r)
    expected = [
        [-32, -8, 32, 8],  # ratio 1/4, scale 1: 64 x 16
        [-64, -16, 64, 16],  # ratio 1/4, scale 2: 128 x 32
        [-16, -16, 16, 16],  # ratio 1, scale 1
        [-32, -32, 32, 32],
        [-8, -32, 8, 32],  # ratio 4, scale 1: 16 x 64
        [-16, -64, 16, 64],
    ]
    assert cell_anchors(32, (1, 2), (0.25, 1, 4)).tolist() == expected


def test_cell_anchors_of_p3() -> None:
    # 16 sqrt(2) = 22.6274, 16 / sqrt(2) = 11.3137; times 2^(1/3) = 1.259921 and 2^(2/3) = 1.587401
    half = [(22.6274, 11.3137), (28.5088, 14.2544), (35.9188, 17.9594)]
    square = [16.0, 20.1587, 25.3984]
    expected = (
        [[-w, -h, w, h] for w, h in half] + [[-s, -s, s, s] for s in square] + [[-h, -w, h, w] for w, h in half]
    )  # lying, square, standing
    torch.testing.assert_close(cell_anchors(32, SCALES, RATIOS), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_cell_anchors_equal_torchvisions_up_to_its_rounding(size: int) -> None:
    theirs = TorchvisionAnchors().generate_anchors([size * scale for scale in SCALES], list(RATIOS))
    torch.testing.assert_close(cell_anchors(size, SCALES, RATIOS).round(), theirs)


@pytest.mark.parametrize("size", [32, 512])
def test_areas_and_ratios(size: int) -> None:
    width, height = (cell_anchors(size, SCALES, RATIOS)[:, 2:] * 2).double().T
    areas = [(size * scale) ** 2 for _ in RATIOS for scale in SCALES]
    ratios = [ratio for ratio in RATIOS for _ in SCALES]
    torch.testing.assert_close(width * height, torch.tensor(areas, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(height / width, torch.tensor(ratios, dtype=torch.float64), rtol=1e-6, atol=0)


def test_centres_run_over_rows_then_columns_then_anchors() -> None:
    generator = AnchorGenerator([4], scales=[1, 2], ratios=[1], strides=[8])
    # a grid of 2 rows and 3 columns of 8 pixels: x = 4, 12, 20 and y = 4, 12; sides 4 and 8
    expected = [
        [x - half, y - half, x + half, y + half]
        for y, x, half in [
            (4, 4, 2),
            (4, 4, 4),
            (4, 12, 2),
            (4, 12, 4),
            (4, 20, 2),
            (4, 20, 4),
            (12, 4, 2),
            (12, 4, 4),
            (12, 12, 2),
            (12, 12, 4),
            (12, 20, 2),
            (12, 20, 4),
        ]
    ]
    assert generator([(2, 3)]).tolist() == expected


def test_offset_zero_centres_anchors_on_the_cells_corner() -> None:
    anchors = AnchorGenerator([4], scales=[1], ratios=[1], strides=[8], offset=0)([(1, 2)])
    assert anchors.tolist() == [[-2, -2, 2, 2], [6, -2, 10, 2]]  # around x = 0 and 8


def test_levels_follow_each_other_with_fixed_strides() -> None:
    anchors = AnchorGenerator(scales=[1], ratios=[1])([(1, 1), (1, 2), (1, 1), (0, 3), (2, 1)])
    expected = [
        [-12, -12, 20, 20],  # P3: centre 4, side 32
        [-24, -24, 40, 40],  # P4: centre 8, side 64
        [-8, -24, 56, 40],  # ... and 8 + 16
        [-48, -48, 80, 80],  # P5: centre 16, side 128
        [-192, -192, 320, 320],  # P7: centre 64, side 512; P6 has no rows
        [-192, -64, 320, 448],  # ... and 64 + 128 in y
    ]
    assert anchors.tolist() == expected


def test_number_for_an_image_of_800_by_1333() -> None:
    grids = [(-(-800 // stride), -(-1344 // stride)) for stride in STRIDES]  # padded to a multiple of 32
    # 100 * 168 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11 = 22,400 cells of 9
    anchors = AnchorGenerator()(grids)
    assert anchors.shape == (201_600, 4)
    assert anchors.dtype == torch.float32
    last = anchors[-9:].double()
    centre = (last[:, :2] + last[:, 2:]) / 2
    # the last cell of P7 is row 6, column 10: (10.5, 6.5) * 128, whatever the padded size divided by the grid
    torch.testing.assert_close(centre, torch.tensor([[1344.0, 832.0]], dtype=torch.float64).expand(9, 2))


def test_anchors_do_not_depend_on_padding() -> None:
    generator = AnchorGenerator()
    small, padded = [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)], [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    # the cells that both grids have get the same anchors
    for level, ((rows, columns), (more_rows, more_columns)) in enumerate(zip(small, padded)):
        stride = (8 * 2**level,) * 2
        one = generator._grid(level, (rows, columns), stride).reshape(rows, columns, 9, 4)
        other = generator._grid(level, (more_rows, more_columns), stride).reshape(more_rows, more_columns, 9, 4)
        assert torch.equal(one, other[:rows, :columns])


def test_as_many_sizes_as_levels() -> None:
    with pytest.raises(ValueError, match="4 anchor sizes for 5 levels"):
        AnchorGenerator([32, 64, 128, 256])


def test_six_sizes_are_those_of_p2_to_p7() -> None:
    generator = AnchorGenerator([16, 32, 64, 128, 256, 512], scales=[1], ratios=[1])
    assert generator.strides == P2_STRIDES == (4, 8, 16, 32, 64, 128)
    anchors = generator([(1, 2), (1, 1), (1, 1), (0, 1), (0, 1), (0, 1)])
    expected = [
        [-6, -6, 10, 10],  # P2: centre 2, side 16
        [-2, -6, 14, 10],  # ... and 2 + 4
        [-12, -12, 20, 20],  # P3: centre 4, side 32
        [-24, -24, 40, 40],  # P4: centre 8, side 64
    ]
    assert anchors.tolist() == expected


def test_from_a_config() -> None:
    config = AnchorConfig(sizes=[10, 20, 40, 80, 160], scales=[1], ratios=[1], offset=0, integer=True, strides="grid")
    generator = build_anchors(config)
    assert generator.strides_by_grid and generator.strides == STRIDES
    anchors = generator([(1, 3), (1, 2), (1, 1), (1, 1), (1, 1)], (40, 40))
    # strides of 40 // 3 = 13, from the cell's corner on
    assert anchors[:3].tolist() == [[-5, -5, 5, 5], [8, -5, 18, 5], [21, -5, 31, 5]]


def test_cells_move_with_the_module_and_stay_out_of_checkpoints() -> None:
    generator = AnchorGenerator()
    assert generator.state_dict() == {}
    assert generator.to(torch.float64)([(1, 1)]).dtype == torch.float64
    assert generator.to("meta")([(1, 1)]).device.type == "meta"
