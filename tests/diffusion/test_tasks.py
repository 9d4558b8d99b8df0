from __future__ import annotations

from collections import Counter

import pytest
import torch

from stdit.diffusion.tasks import TASKS, Task, check_weights, draw_task, frame_levels
from stdit.errors import StditError

WEIGHTS = {"text_to_video": 2.0, "image_to_video": 1.0, "extend": 0.5, "first_last_to_video": 0.5}


def draw(clip: int, weights=WEIGHTS, latent_frames=5, **key):
    return draw_task(weights, latent_frames, seed=0, epoch=key.get("epoch", 0), clip_id=str(clip), occurrence=0)


def test_tasks_come_in_their_proportions_and_leave_something_to_generate():
    tasks = [draw(clip) for clip in range(2000)]
    counts = Counter(task.name for task in tasks)
    for name, share in zip(TASKS, (0.5, 0.25, 0.125, 0.125)):
        assert abs(counts[name] / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5
    known = {name: {(task.known_frames, task.last) for task in tasks if task.name == name} for name in TASKS}
    some = {(2, False), (3, False), (4, False)}
    assert list(known.values()) == [{(0, False)}, {(1, False)}, some, {(1, True)}]


def test_drawn_by_key_and_not_by_the_order_of_the_config():
    again = {name: WEIGHTS[name] for name in reversed(TASKS)}
    assert [draw(clip) for clip in range(50)] == [draw(clip, again) for clip in range(50)]
    assert [draw(clip) for clip in range(50)] != [draw(clip, epoch=1) for clip in range(50)]


def test_an_image_is_text_to_video():
    assert {draw(clip, {"extend": 1.0}, latent_frames=1) for clip in range(20)} == {Task()}
    assert {draw(clip, {"extend": 1.0}, latent_frames=2).known_frames for clip in range(20)} == {1}


def test_mask_and_levels():
    mask = Task("extend", 2).mask(4)
    assert mask.tolist() == [True, True, False, False]
    t = torch.tensor(0.7, dtype=torch.float64)
    assert frame_levels(mask, t).tolist() == [0.0, 0.0, 0.7, 0.7]
    assert frame_levels(mask, t, patch_frames=2).tolist() == [0.0, 0.7]
    assert frame_levels(Task().mask(3), t).tolist() == [0.7] * 3
    with pytest.raises(StditError, match="multiple of 2"):
        frame_levels(Task("image_to_video", 1).mask(4), t, patch_frames=2)
    with pytest.raises(StditError, match="nothing to generate"):
        Task("extend", 3).mask(3)


@pytest.mark.parametrize("weights", [{}, {"extend": 0.0}, {"extend": -1.0}, {"image_to_vidoe": 1.0}])
def test_wrong_weights(weights):
    with pytest.raises(StditError, match=r"must not be negative|'image_to_video'"):
        check_weights(weights)
