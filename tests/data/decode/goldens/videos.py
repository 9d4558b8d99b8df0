"""Makes videos.json: what PyAV alone, and ffprobe where it is installed, say of every file in shared/videos.

    python tests/data/decode/goldens/videos.py FOLDER

Nothing of stdit is imported. Each file has either its size as displayed (the rotation that FFmpeg reads from the
container applied, pixels made square), frames per second, frames that decode and whether decoding ended in an error, or
the reason why it is no video. Of a file with more than MAX_FRAMES, packets are counted instead. Fails where ffprobe
disagrees with PyAV.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av

from stdit.data.decode.video import OPEN_OPTIONS

MAX_FRAMES = 3000


def by_pyav(path: Path) -> dict:
    if not path.stat().st_size:
        return {"reason": "empty"}
    try:
        container = av.open(str(path), **OPEN_OPTIONS)
    except av.InvalidDataError:
        return {"reason": "not_media"}
    with container:
        if not container.streams.video:
            return {"reason": "no_video"}
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames, first, damaged = 0, None, False
        try:
            for frame in container.decode(stream):
                first = first or frame
                frames += 1
                if frames == MAX_FRAMES and stream.frames > MAX_FRAMES:
                    break
        except av.InvalidDataError:
            damaged = True
        aspect, rate = stream.sample_aspect_ratio or 1, stream.average_rate
        turned = first.rotation in (90, -90, 270, -270)
    if frames == MAX_FRAMES:
        with av.open(str(path)) as container:
            frames = sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    size = (round(first.width * aspect), first.height)
    return {
        "width": size[turned],
        "height": size[not turned],
        "fps": round(float(rate), 3),
        "frames": frames,
        "damaged": damaged,
    }


def by_ffprobe(path: Path, count: str) -> dict:
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", f"-count_{count}", "-of", "json", "-show_streams"]
    stream = json.loads(subprocess.run([*command, path], capture_output=True, check=False, timeout=300).stdout)[
        "streams"
    ][0]
    turned = any(abs(int(one.get("rotation", 0))) in (90, 270) for one in stream.get("side_data_list", ()))
    aspect = stream.get("sample_aspect_ratio", "1:1").split(":")
    size = (round(stream["width"] * int(aspect[0]) / int(aspect[1])), stream["height"])
    return {"width": size[turned], "height": size[not turned], "frames": int(stream[f"nb_read_{count}"])}


def main(folder: Path) -> None:
    table = {}
    for path in sorted(folder.glob("*/*.*")):
        name = path.relative_to(folder).as_posix()
        table[name] = found = by_pyav(path)
        if shutil.which("ffprobe") and "reason" not in found and not found["damaged"]:
            other = by_ffprobe(path, "packets" if found["frames"] > MAX_FRAMES else "frames")
            assert found | other == found, (name, found, other)
        print(name, found, flush=True)
    Path(__file__).with_suffix(".json").write_text(
        "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(found)}" for name, found in table.items()) + "\n}\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
