"""How long the real data sets take to load, and how much memory: files of the true size, with made-up texts.

    python benchmarks/data_loading.py                      about five minutes, some GB of disk under --folder
    python benchmarks/data_loading.py --only scienceqa     one of them
    python benchmarks/data_loading.py --out FILE.json      (default: results/data_loading.json)

The files are in the owners' form, with as many records as published and texts of about the published length; pictures
are empty files (nothing opens them on loading). Each is loaded in a process of its own, after the libraries: `MB` is
what the process's resident set grew by at its peak, `libraries MB` what it was before.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

WORDS = ("the", "of", "a", "is", "which", "energy", "plant", "force", "sample", "object", "figure", "water", "shows")
RECORDS = {"scienceqa": 21_208, "slake": 14_028, "nlvr2": 100_322, "flickr30k": 31_014, "vqav2": 658_111}


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def write_scienceqa(folder: Path, rng: random.Random) -> None:
    """12,726 / 4,241 / 4,241 records; of two a picture, of two a hint, and 1.4 kB of text each, as in the real file."""
    problems, splits = {}, {"train": 12_726, "val": 4_241, "test": 4_241}
    pids = {}
    for split, count in splits.items():
        pids[split] = [str(len(problems) + i + 1) for i in range(count)]
        for i, pid in enumerate(pids[split]):
            picture = i % 2 == 0
            if picture:
                empty(folder / "images" / split / pid / "image.png")
            problems[pid] = {
                "question": words(rng, 12),
                "choices": [words(rng, 4) for _ in range(2 + i % 4)],
                "answer": i % 2,
                "hint": words(rng, 40) if i % 4 < 2 else "",
                "image": "image.png" if picture else None,
                "task": "closed choice",
                "grade": f"grade{1 + i % 12}",
                "subject": ("natural science", "social science", "language science")[i % 3],
                "topic": "physics",
                "category": words(rng, 2),
                "skill": words(rng, 4),
                "lecture": words(rng, 110) if i % 6 else "",
                "solution": words(rng, 60),
                "split": split,
            }
    dump(folder / "problems.json", problems)
    dump(folder / "pid_splits.json", pids)


def write_slake(folder: Path, rng: random.Random) -> None:
    qid = 0
    for name, count in {"train": 9_835, "validate": 2_099, "test": 2_094}.items():
        records = []
        for i in range(count):
            place = f"xmlab{(qid // 22) % 642}/source.jpg"
            empty(folder / "imgs" / place)
            records.append({
                "img_id": (qid // 22) % 642,
                "img_name": place,
                "question": words(rng, 8),
                "answer": words(rng, 2),
                "q_lang": "en" if i % 2 else "zh",
                "location": "Abdomen",
                "modality": "MRI",
                "answer_type": "OPEN" if i % 3 else "CLOSED",
                "base_type": "vqa",
                "content_type": "Organ",
                "triple": ["vhead", "_", "_"],
                "qid": qid,
            })  # fmt: skip
            qid += 1
        dump(folder / f"{name}.json", records)


def write_nlvr2(folder: Path, rng: random.Random) -> None:
    for name, count in {"train": 86_373, "dev": 6_982, "test1": 6_967}.items():
        with open(folder / f"{name}.json", "w", encoding="utf-8") as file:
            for i in range(count):
                pair = f"{name}-{i // 8}-{i // 2 % 4}"
                record = {
                    "sentence": words(rng, 15),
                    "left_url": "https://example.org/" + "x" * 60,
                    "right_url": "https://example.org/" + "x" * 60,
                    "label": "True" if i % 2 else "False",
                    "identifier": f"{pair}-{i % 2}",
                    "validation": {"1": "True"},
                    "synset": "bottle",
                    "query": "bottles",
                }
                where = folder / name
                if name == "train":
                    record["directory"] = i % 100
                    where = folder / "images" / "train" / str(i % 100)
                for side in (0, 1):
                    empty(where / f"{pair}-img{side}.png")
                file.write(json.dumps(record) + "\n")


def write_flickr30k(folder: Path, rng: random.Random) -> None:
    images = []
    for i in range(RECORDS["flickr30k"]):
        split = "train" if i < 29_000 else "val" if i < 30_014 else "test"
        name = f"{1_000_000_000 + i}.jpg"
        empty(folder / "flickr30k-images" / name)
        captions = [words(rng, 12) + f" {i} {k}." for k in range(5)]
        sentences = [{"tokens": c.split(), "raw": c, "imgid": i, "sentid": 5 * i + k} for k, c in enumerate(captions)]
        ids = [5 * i + k for k in range(5)]
        images.append({"sentids": ids, "imgid": i, "sentences": sentences, "split": split, "filename": name})
    dump(folder / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})


def write_vqav2(folder: Path, rng: random.Random) -> None:
    for name, (count, pictures) in {"train2014": (443_757, 82_783), "val2014": (214_354, 40_504)}.items():
        questions, annotations = [], []
        for i in range(count):
            image, number = 1 + i % pictures, 1000 * (1 + i % pictures) + i // pictures
            empty(folder / name / f"COCO_{name}_{image:012d}.jpg")
            questions.append({"image_id": image, "question": words(rng, 7) + "?", "question_id": number})
            said = rng.choices(WORDS, k=3)
            people = [
                {"answer": said[k % 3 if k > 5 else 0], "answer_confidence": "yes", "answer_id": k + 1}
                for k in range(10)
            ]
            annotations.append({
                "question_type": "what is",
                "multiple_choice_answer": said[0],
                "answers": people,
                "image_id": image,
                "answer_type": ("yes/no", "number", "other")[i % 3],
                "question_id": number,
            })  # fmt: skip
        head = {"info": {}, "license": {}, "data_subtype": name, "data_type": "mscoco"}
        dump(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", head | {"questions": questions})
        dump(folder / f"v2_mscoco_{name}_annotations.json", head | {"annotations": annotations})


@cache
def folder_of(path: str) -> None:
    Path(path).mkdir(parents=True, exist_ok=True)


def empty(path: Path) -> None:
    folder_of(str(path.parent))
    path.touch()


def dump(path: Path, value) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


WRITERS = {
    "scienceqa": write_scienceqa,
    "slake": write_slake,
    "nlvr2": write_nlvr2,
    "flickr30k": write_flickr30k,
    "vqav2": write_vqav2,
}


# ---------------------------------------------------------------------- one data set, in a process of its own
def measure(name: str, folder: str) -> dict:
    """Seconds and memory of load_task, all roles, pictures looked up and not opened."""
    import psutil

    import eas_kit as eas
    import eas_kit.tasks.data_set  # the libraries, before the clock starts
    from eas_kit.timing import peak_memory

    process = psutil.Process()
    before = process.memory_info().rss
    with peak_memory() as peak:
        began = time.perf_counter()
        task = eas.load_task(name, None, data_dir=folder)
        seconds = time.perf_counter() - began
    examples = {role: len(getattr(task, role)) for role in ("train", "search", "val", "test")}
    after = process.memory_info().rss
    return {
        "examples": examples,
        "seconds": seconds,
        "peak_mb": (peak["resident_peak"] - peak["resident_before"]) * 2**20 / 1e6,
        "kept_mb": (after - before) / 1e6,
        "libraries_mb": before / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3, help="loads each; the median is reported")
    default = Path(__file__).parent / "results" / "data_loading.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    from eas_kit.report import machine, versions

    rows = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.only:
            place = Path(folder) / name
            place.mkdir()
            WRITERS[name](place, random.Random(0))
            runs = []
            for _ in range(args.repeats):
                command = [sys.executable, __file__, "--measure", name, str(place)]
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                runs.append(json.loads(out.splitlines()[-1]))
            runs.sort(key=lambda run: run["seconds"])
            file_mb = sum(p.stat().st_size for p in place.glob("*.json")) / 1e6
            middle = runs[len(runs) // 2]
            spread = [runs[0]["seconds"], runs[-1]["seconds"]]
            rows[name] = middle | {"records": RECORDS[name], "json_mb": file_mb, "seconds_range": spread}
            print(
                f"{name:<10} {RECORDS[name]:>8,} records, {file_mb:6.0f} MB of JSON: {middle['seconds']:6.2f} s,"
                f" {middle['peak_mb']:6.0f} MB at the peak, {middle['kept_mb']:6.0f} MB kept"
            )
    only = "" if args.only == list(WRITERS) else " --only " + " ".join(args.only)
    about = {"command": f"python benchmarks/data_loading.py{only} --repeats {args.repeats}", "repeats": args.repeats}
    found = about | {"machine": machine(), "versions": versions(), "data_sets": rows}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
