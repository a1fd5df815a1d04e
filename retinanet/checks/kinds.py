"""What a check can find, how bad it is, and what to do about it."""

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Kind(NamedTuple):
    """Errors stop training or teach it what is wrong; warnings are to be looked at; notes are good to know."""

    severity: Severity
    hint: str


KINDS = {
    # Entries that reading refuses
    "unusable entry": Kind("error", "mend or delete the entry"),
    "unusable file name": Kind("error", "name a file inside the image folder"),
    "unusable box": Kind("error", "give the four finite numbers of the box, or delete the annotation"),
    "unknown class": Kind("error", "add the class, or delete the annotation"),
    "unknown image id": Kind("error", "add the image, or delete the annotation"),
    "duplicate image id": Kind("error", "give every image an id of its own"),
    "missing label file": Kind("note", "trained on as background: write its labels, or an empty file if that is meant"),
    # Pictures
    "missing image": Kind("error", "bring the file back, or leave the image out (--fix drop)"),
    "unreadable image": Kind("error", "replace the file, or leave the image out (--fix drop)"),
    "truncated image": Kind("error", "copy the file again, or leave the image out (--fix drop)"),
    "huge image": Kind("error", "cut it into tiles: it is too large to be opened safely"),
    "size mismatch": Kind("error", "the picture was replaced or resized after labelling: take the picture that was labelled"),
    "rotated size": Kind("error", "labelled without the EXIF rotation: turn the pixels and delete the tag, or turn the boxes"),
    "converted image": Kind("note", "becomes 8-bit RGB when read"),
    "duplicate file name": Kind("error", "join the entries of the file: each calls the other's objects background"),
    "unlisted image": Kind("note", "label it, or delete it: no annotation file names it"),
    "label file without image": Kind("note", "bring the picture back, or delete the file"),
    "identical images": Kind("warning", "keep one"),
    "near-identical images": Kind("warning", "keep one, unless they differ in what matters"),
    "identical images across splits": Kind("error", "keep one: the AP of a picture that was trained on says nothing"),
    "near-identical images across splits": Kind("warning", "split by scene or film instead of by picture"),
    # Boxes
    "zero-size box": Kind("error", "draw the box again, or delete it (--fix clip): it is left out of training"),
    "negative box": Kind("error", "exchange its corners, or delete it (--fix clip): it is left out of training"),
    "outside box": Kind("error", "draw the box again, or delete it (--fix clip): it is left out of training"),
    "border box": Kind("warning", "nothing must be done: training clips it; --fix clip clips it in the file"),
    "duplicate box": Kind("warning", "delete one (--fix clip)"),
    "two classes on a box": Kind("warning", "decide for one class"),
    "tiny box": Kind("warning", "train at a larger input.short_edge or in tiles: little is left of it after the resize"),
    "extreme box": Kind("warning", "look whether it is right; if such boxes matter, let tools/suggest_anchors.py fit anchors"),
    "whole-image box": Kind("note", "look whether it is a box that someone drew"),
    "duplicate annotation id": Kind("warning", "number the annotations anew: pycocotools keeps the last of each number only"),
    # Images, classes and splits as a whole
    "image without boxes": Kind("note", "trained on as background; data.drop_empty leaves it out"),
    "many boxes": Kind("warning", "raise postprocess.max_detections, or cut the picture into tiles"),
    "crowd boxes": Kind("note", "crowds and difficult objects are ignored: neither objects nor background"),
    "many crowds": Kind("warning", "look whether that was meant: crowds and difficult objects teach nothing"),
    "class without boxes": Kind("warning", "label some, or take the class out: it cannot be learnt"),
    "rare class": Kind("warning", "label more; data.repeat_threshold shows its images more often"),
    "class id gap": Kind("note", "nothing must be done: any ids will do"),
    "class missing in a split": Kind("warning", "split anew: it is trained but not measured, or measured but not trained"),
    "classes differ": Kind("error", "list the same classes in every split"),
    "anchors miss boxes": Kind("warning", "let tools/suggest_anchors.py fit anchors to the data"),
}

REFUSED = {"unusable entry", "unusable file name", "unusable box", "unknown class", "unknown image id", "duplicate image id"}
