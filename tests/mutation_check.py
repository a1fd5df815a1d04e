"""Takes out, one after the other, the guards that docs/security.md names, and demands that a test notices each.

python tests/mutation_check.py [WORD]      those whose promise holds WORD; a few seconds each

Works in a copy in a temporary folder; the sources stay as they are. pytest does not collect this file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parent.parent
COPIED = ("retinanet", "tests", "tools", "datasets/download_coco.py", "pyproject.toml")


class Mutation(NamedTuple):
    promise: str
    file: str
    guard: str  # the exact source
    without: str  # what stands in its place
    test: str


WEIGHTS, IMAGES = "retinanet/weights/files.py", "retinanet/data/images.py"
SECURITY, MEDIA = "tests/test_security.py::test_", "tests/test_security_media.py::test_"
PAGE, REPORT = "retinanet/report/page.py", "tests/test_report_page.py::test_"
DOWNLOAD = "tests/test_download_coco.py::test_"
MUTATIONS = [
    Mutation("checkpoints execute nothing", "retinanet/checkpoint.py", "weights_only=True)\n", "weights_only=False)\n",
             "tests/test_checkpoint.py::test_code_in_a_file_is_not_executed"),
    Mutation("backbones execute nothing", "retinanet/backbone.py", "weights_only=True)", "weights_only=False)",
             "tests/test_model.py::test_code_in_weights_is_not_executed"),
    Mutation("other projects' weights execute nothing", WEIGHTS, "weights_only=True)", "weights_only=False)",
             "tests/test_convert_weights.py::test_wrong_file[malicious archive-torchvision]"),
    Mutation("pickles call nothing", WEIGHTS, 'raise UserError(REFUSED.format(f"{module}.{name}"))',
             "return super().find_class(module, name)",
             "tests/test_convert_weights.py::test_wrong_file[malicious pickle-detectron2]"),
    Mutation("pickles call no codec", WEIGHTS, 'if encoding != "latin1":', "if False:",
             "tests/test_convert_weights.py::test_wrong_file[malicious codec-detectron2]"),
    Mutation("pickled arrays stay in their bytes", WEIGHTS, '"ndarray"): _Array', '"ndarray"): np.ndarray',
             SECURITY + "a_pickled_array_is_no_more_than_its_bytes"),
    Mutation("short pickles take little memory", WEIGHTS, "_ArraysOnly(pickle._Unpickler)",
             "_ArraysOnly(pickle.Unpickler)", SECURITY + "a_short_pickle_takes_little_memory[memo]"),
    Mutation("short pickles make no room", WEIGHTS, "pickle.BYTEARRAY8[0]: load", "-1: load",
             SECURITY + "a_short_pickle_takes_little_memory[bytes]"),
    Mutation("tensors hold no more than the file", WEIGHTS, "if size < 0:", "if False:",
             SECURITY + "tensors_hold_no_more_than_their_file"),
    *(Mutation(f"zip bombs: {reader}", file, "check_unfolding(archive, path)", "pass",
               f"{SECURITY}a_zip_bomb_is_not_unfolded[{reader}]")
      for reader, file in (("checkpoint", "retinanet/checkpoint.py"), ("backbone", "retinanet/backbone.py"),
                           ("other project's", WEIGHTS))),
    Mutation("configs call nothing", "retinanet/config/load.py", "_Loader(yaml.SafeLoader)", "_Loader(yaml.UnsafeLoader)",
             SECURITY + "yaml_calls_nothing[config]"),
    Mutation("data.yaml calls nothing", "retinanet/data/files.py", "yaml.BaseLoader", "yaml.UnsafeLoader",
             SECURITY + "yaml_calls_nothing[data.yaml]"),
    Mutation("references do not unfold", "retinanet/config/load.py", "_unfolded(node, {}) > LARGEST_CONFIG", "False",
             SECURITY + "a_config_is_bounded[references]"),
    Mutation("nesting is one line", "retinanet/config/load.py", "except (yaml.YAMLError, ValueError, RecursionError) as",
             "except yaml.YAMLError as", SECURITY + "a_config_is_bounded[nesting]"),
    Mutation("values are shown short", "retinanet/config/load.py", "(got {SHOWN.repr(fault['input'])})\"\n",
             "(got {fault['input']!r})\"\n", SECURITY + "a_config_is_bounded[long value]"),
    Mutation("no DOCTYPE in XML", "retinanet/data/voc.py", 'if b"<!DOCTYPE" in', 'if b"<!NONE" in',
             "tests/test_voc_reader.py::test_declarations_are_refused_unread"),
    Mutation("files have a largest size", "retinanet/bounded.py", "if status.st_size > largest or len(content) > largest:",
             "if False:", SECURITY + "a_file_too_large_for_its_kind_is_not_read"),
    Mutation("pipes are not waited for", "retinanet/bounded.py", 'getattr(os, "O_NONBLOCK", 0)', "0",
             SECURITY + "what_is_no_file_is_neither_waited_for_nor_read_without_end"),
    Mutation("transforms are albumentations' own", "retinanet/data/transforms.py", ', "Lambda"}', "}",
             SECURITY + "augmentation_is_transforms_alone"),
    Mutation("names stay in the folder", "retinanet/data/coco.py", 'or ".." in path.parts', "",
             SECURITY + "a_data_set_names_only_its_own_files_and_in_plain_letters"),
    Mutation("names of files are plain", "retinanet/data/coco.py", "or CONTROL.search(name)", "",
             SECURITY + "a_data_set_names_only_its_own_files_and_in_plain_letters"),
    *(Mutation(f"names of classes are plain: {namer}", file, call, "pass",
               f"{SECURITY}names_of_classes_do_not_speak_to_the_terminal[{namer}]")
      for namer, file, call in (("any reader", "retinanet/data/annotations.py", "check_names(categories, source)"),
                                ("checkpoint", "retinanet/checkpoint.py", 'check_names(categories, f"weights {path}")'),
                                ("ONNX", "retinanet/onnx/runtime.py", "check_names(categories, where)"))),
    Mutation("what is said is plain", "retinanet/distributed.py", "print(printable(message)", "print((message)",
             SECURITY + "what_is_said_does_not_speak_to_the_terminal"),
    Mutation("errors are plain", "retinanet/errors.py", "{printable(message)}", "{message}",
             SECURITY + "what_is_said_does_not_speak_to_the_terminal"),
    Mutation("folders of crops stay inside", "retinanet/outputs.py", 're.sub(r"[^\\w-]", "_", category.name)', "category.name",
             "tests/test_outputs.py::test_names_of_classes_lead_nowhere_else"),
    Mutation("names in a page end no script", PAGE, '.replace("<", "\\\\u003c")', "",
             REPORT + "names_cannot_leave_their_place"),
    Mutation("names in a page turn no text", PAGE, "text = BIDI.sub(", "BIDI.sub(",
             REPORT + "names_cannot_leave_their_place"),
    Mutation("titles of a page are text", PAGE, "html.escape(BIDI", "(BIDI", REPORT + "names_cannot_leave_their_place"),
    Mutation("a page runs its own script alone", PAGE, "script-src '{_digest(script)}'", "script-src 'unsafe-inline'",
             REPORT + "the_policy_lets_this_script_run_and_nothing_else"),
    Mutation("huge pictures", IMAGES, "EXTENSIONS = {", "Image.MAX_IMAGE_PIXELS = None\nEXTENSIONS = {",
             MEDIA + "a_picture_that_would_unfold_is_refused"),
    Mutation("no interpreter for pictures", IMAGES, ", formats=FORMATS)", ")", MEDIA + "postscript_is_not_run"),
    Mutation("pipes are no pictures", IMAGES, "if Path(path).is_fifo():", "if False:",
             SECURITY + "what_is_no_file_is_neither_waited_for_nor_read_without_end"),
    Mutation("videos are no lists", "retinanet/inputs.py", "|format_whitelist;{CONTAINERS}", "",
             MEDIA + "a_video_is_no_list_of_other_files"),
    Mutation("only https", "retinanet/download.py", "if not is_safe(url):", "if False:", MEDIA + "only_https_is_fetched"),
    Mutation("redirects only to https", "retinanet/download.py", '.scheme != "https"', '.scheme == "never"',
             MEDIA + "a_redirect_away_from_https_is_not_followed"),
    Mutation("downloads have a largest size", "retinanet/download.py", "if sink.tell() + len(chunk) > largest:", "if False:",
             MEDIA + "what_comes_is_bounded_and_checked_before_it_has_its_name"),
    Mutation("downloads have a digest", "retinanet/download.py", "if not file_digest(partial, algorithm).startswith(begin):",
             "if False:", MEDIA + "what_comes_is_bounded_and_checked_before_it_has_its_name"),
    Mutation("downloads get their names last", "retinanet/download.py", 'path.with_name(f".{path.name}.{os.getpid()}")', "path",
             MEDIA + "what_comes_is_bounded_and_checked_before_it_has_its_name"),
    Mutation("archives stay in their folder", "datasets/download_coco.py", 'or ".." in parts', "",
             DOWNLOAD + "a_member_that_could_write_elsewhere_is_refused"),
    Mutation("archives hold no links", "datasets/download_coco.py", "(0, stat.S_IFREG, stat.S_IFDIR)", "range(1 << 17)",
             DOWNLOAD + "a_member_that_could_write_elsewhere_is_refused"),
    Mutation("archives are no bombs", "datasets/download_coco.py", "if total > archive.unpacked:", "if False:",
             DOWNLOAD + "a_bomb_is_refused"),
    Mutation("archives have few members", "datasets/download_coco.py", "if len(members) > archive.files + 1:", "if False:",
             MEDIA + "an_archive_of_endless_members_is_not_unpacked"),
    Mutation("archives have a checksum", "datasets/download_coco.py", "if found != archive.md5:", "if False:",
             DOWNLOAD + "a_wrong_checksum_is_told_and_the_file_moved_aside"),
]  # fmt: skip


def passes(folder: Path, *tests: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode not in (0, 1, -11):  # passed, failed, and ended by what the guard keeps away
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode == 0


def main() -> None:
    chosen = [mutation for mutation in MUTATIONS if " ".join(sys.argv[1:]) in mutation.promise]
    with tempfile.TemporaryDirectory() as name:
        folder, missed = Path(name), 0
        for part in COPIED:
            (folder / part).parent.mkdir(exist_ok=True)
            (shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copyfile)(REPOSITORY / part, folder / part)
        if not passes(folder, *dict.fromkeys(mutation.test for mutation in chosen)):
            sys.exit("the tests fail with all guards in place")
        for mutation in chosen:
            file = folder / mutation.file
            source = file.read_text(encoding="utf-8")
            if mutation.guard not in source:
                sys.exit(f"{mutation.file} has no {mutation.guard!r} (any more): {mutation.promise}")
            file.write_text(source.replace(mutation.guard, mutation.without), encoding="utf-8")
            caught = not passes(folder, mutation.test)
            file.write_text(source, encoding="utf-8")
            missed += not caught
            print(f"{'caught' if caught else 'MISSED':8}{mutation.promise:40}{mutation.test.partition('::')[2]}", flush=True)
    sys.exit(f"{missed} of {len(chosen)} were not noticed" if missed else 0)


if __name__ == "__main__":
    main()
