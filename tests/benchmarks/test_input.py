"""Pure parts of the input benchmark: equal bytes of both decoders, and what is counted as waiting."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.input import SIZE, Photos, Waiting, data_config, write_photos
from input_pipeline.batches import eval_batches
from input_pipeline.dataset import load_dataset


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_decoding_gives_the_bytes_of_the_pipeline(tmp_path, channels):
    write_photos(tmp_path, 3, size=(80, 60))
    with Image.open(tmp_path / "0000.jpg") as file:
        assert (file.format, file.size, file.mode) == ("JPEG", (80, 60), "RGB")
    split = load_dataset(data_config(tmp_path, channels, SIZE, memory=False), reader="threads").splits["train"]
    assert not split.in_memory
    (batch,) = eval_batches(split, 3)
    photos = Photos([example.image for example in split.pixels.examples], channels)
    np.testing.assert_array_equal(batch["image"], np.stack([photos[i] for i in range(len(photos))]))
    assert batch["image"].std() > 20


def test_waiting_counts_from_the_draw_after_the_warm_up(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("benchmarks.input.time.perf_counter", lambda: clock[0])

    def batches():
        for i, seconds in enumerate((5.0, 6.0, 0.25, 0.5)):
            clock[0] += seconds
            yield {"image": i}

    waiting = Waiting(batches(), skip=2)
    for i in range(4):
        assert next(waiting)["image"] == i
        clock[0] += 1.0  # the update
    assert waiting.since == 100.0 + 5.0 + 1.0 + 6.0 + 1.0
    assert waiting.seconds == 0.25 + 0.5
    with pytest.raises(StopIteration):
        next(waiting)
