"""Devices that talk, in every notation that XLA prints."""

import pytest

from jaxplain.planning.collectives import collectives, device_groups
from tests.exemplars.test_reduction import make_mesh

LINES = {
    "listed": ("%a = f32[8] all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
    "pairs": ("%a = f32[8] collective-permute(%x), source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    "counted": (
        "%a = f32[8] all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}",
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    ),
    "transposed": (
        "%a = f32[8] all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0)",
        [[0, 2, 4, 6], [1, 3, 5, 7]],
    ),
    "none": ("%a = f32[8] all-reduce(%x), to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
}


@pytest.mark.parametrize("notation", LINES)
def test_groups(notation):
    line, groups = LINES[notation]
    assert device_groups(line, 8) == groups


def test_kinds_are_counted_by_axis():
    text = """
  %all-reduce.5 = f32[8] all-reduce(%fusion.1), replica_groups={{0,1},{2,3}}, to_apply=%add
  %s = (f32[8], f32[8]) all-gather-start(%all-reduce.5), replica_groups={{0,2},{1,3}}
  %d = f32[8] all-gather-done(%s)
  %c = f32[8] collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %t = (f32[8]) tuple(%all-reduce.5)
"""
    found = collectives(text, make_mesh(2, 2))
    assert found == {"model": {"all-reduce": 1, "collective-permute": 1}, "data": {"all-gather": 1}}
