from __future__ import annotations

from pathlib import Path

import pytest

from agff.adapter_folder import hub_name


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
        ("models/Qwen2-VL-7B", "Qwen/Qwen2-VL-7B"),
        ("models/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("models/Qwen3-VL-30B-A3B-Thinking", "Qwen/Qwen3-VL-30B-A3B-Thinking"),
        ("models/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
        ("hub/models--some--Thing-2B/snapshots/0123abc", "some/Thing-2B"),
        ("models/Qwen2-VL-2B-Instruct-mine", None),  # not the public one, as its name says
        ("models/Qwen2-VL-2B-Instruct/mine", None),
    ],
)
def test_a_folder_called_as_the_model_is_on_the_hub_says_its_name(folder: str, name: str | None) -> None:
    assert hub_name(Path(folder)) == name
