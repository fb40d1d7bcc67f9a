"""The pages of measured rows are those of the rows in the repository."""

import pytest

from scripts import released_page, trained_page


@pytest.mark.parametrize("script", [released_page, trained_page])
def test_the_committed_page_is_up_to_date(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make docs`"
