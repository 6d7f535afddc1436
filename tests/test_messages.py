"""docs/messages.md is what is said."""

import re
from pathlib import Path

from tools import messages

PAGE = Path(messages.__file__).parents[1] / "docs" / "messages.md"
OF_A_LIBRARY = r"\(((?:\w+Error|Compressed)[^)`]*)\)"  # the words of Pillow and Python change


def test_page_is_what_is_said():
    made = messages.page()
    assert re.sub(OF_A_LIBRARY, "", PAGE.read_text()) == re.sub(OF_A_LIBRARY, "", made)
    assert made.count("- cut off: ") == len(messages.BINARY) + len(messages.FOLDERS)
    assert messages.SILENT not in made and "/tmp" not in made and "Traceback" not in made


def test_what_is_read_is_not_told(tmp_path):
    messages.tree(tmp_path, *messages.OWN)
    assert messages.told("folder", tmp_path, tmp_path) == messages.SILENT
