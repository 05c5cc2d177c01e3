"""Why a row is not usable: the codes that quarantine files, manifests and `data check` name."""

from typing import Literal

Reason = Literal[
    "malformed_row",  # not JSON, a key is missing, or a value has the wrong type
    "several_turns",  # a conversation of more than one question and one answer
    "bad_id",  # not 1 to 128 of A-Z a-z 0-9 . _ -
    "duplicate_id",  # an earlier row of the corpus has this id
    "text_encoding",  # not UTF-8, or control characters such as NUL
    "text_too_long",
    "empty_question",  # only where the task is vqa
    "empty_answer",
    "no_image",  # the row names none
    "image_not_local",  # an http: or other URL in place of a path
    "missing_image",
    "path_escape",  # the path leads out of the corpus folder
    "symlink_escape",  # a symbolic link leads out of the corpus folder
    "image_format",  # neither JPEG nor PNG, whatever the name says
    "image_frames",  # an animation
    "image_too_large",
    "corrupt_image",  # empty, truncated, or not decodable
    "trailing_bytes",  # something else follows the image in its file (a polyglot)
    "dicom_encoding",  # a DICOM transfer syntax, colour space or sample depth that is not supported
    "dicom_no_pixels",  # a DICOM file that holds no image: a report, a plan
    "missing_frame",  # the DICOM file has fewer frames than the row asks for
    "burned_in_annotation",  # a DICOM file whose pixels show patient data, or may: it says so, or is ultrasound or SC
]


class RowError(Exception):
    """One row or picture cannot be used. Whoever asked turns it into a quarantined row, or a refusal of their own."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason
