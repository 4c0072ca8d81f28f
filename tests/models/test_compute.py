"""How a list of shards is cut into pieces of work."""

from hypothesis import given
from hypothesis import strategies as st

from models.compute import ComputeConfig, group_shards

images = st.lists(st.integers(0, 10_000), max_size=60)


@given(images, st.integers(1, 64), st.integers(1, 20_000), st.integers(1, 8))
def test_each_shard_is_in_one_group_in_its_order(sizes: list[int], processes: int, worth: int, most: int) -> None:
    groups = group_shards(sizes, processes, ComputeConfig(task_images=worth), most)
    assert [shard for group in groups for shard in group] == list(range(len(sizes)))
    assert all(1 <= len(group) <= most for group in groups)


@given(images, st.integers(1, 64), st.integers(1, 20_000))
def test_no_more_processes_than_there_is_work_for(sizes: list[int], processes: int, worth: int) -> None:
    groups = group_shards(sizes, processes, ComputeConfig(task_images=worth), most=len(sizes))
    assert len(groups) <= max(1, min(processes, sum(sizes) // worth))


def test_images_that_cost_more_are_worth_a_process_earlier() -> None:
    sizes, config = [250] * 4, ComputeConfig(task_images=2000)
    assert group_shards(sizes, 2, config) == [range(4)]
    assert group_shards(sizes, 2, config, worth=500) == [range(2), range(2, 4)]
