import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from ldm_serve.settings import Access, ServeSettings
from tests.serve.asgi import calling
from tests.serve.fake_executor import FakeExecutor

TYPES = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css"}
FILES = files("ldm_serve") / "page"
SCRIPT = (FILES / "page.js").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects the start tags of a page, and the text in scripts and styles."""

    def __init__(self):
        super().__init__()
        self.tags, self.inline = [], ""
        self.feed((FILES / "page.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture(scope="module")
def elements():
    return Elements()


def answers(bundle, *calls, keys=None, **options):
    """Return the answers of a server to calls, each a method and a path."""

    async def scenario(client, _):
        return [await client.request(method, path, **options) for method, path in calls]

    access = Access(keys=keys or {})
    settings = ServeSettings(bundles={"tiny": bundle}, access=access, drain_seconds=0.01)
    return calling(settings, FakeExecutor(), scenario)


@pytest.mark.parametrize(("path", "media_type"), TYPES.items())
def test_the_page_is_served_with_its_types_and_the_strict_policy(bundle, path, media_type):
    (answer,) = answers(bundle, ("GET", path))

    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= set(policy)
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_no_key_since_it_asks_for_one(bundle):
    got = answers(bundle, *(("GET", path) for path in TYPES), keys={"alice": "a" * 32})

    assert [each.status_code for each in got] == [200, 200, 200]


@pytest.mark.parametrize("path", TYPES)
def test_head_is_answered_without_a_body(bundle, path):
    got, head = answers(bundle, ("GET", path), ("HEAD", path))

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))


def test_a_browser_is_not_sent_what_it_has(bundle):
    (first,) = answers(bundle, ("GET", "/page.js"))
    headers = {"If-None-Match": first.headers["etag"]}

    same, other = answers(bundle, ("GET", "/page.js"), ("GET", "/page.css"), headers=headers)

    assert (same.status_code, same.content) == (304, b"")
    assert other.status_code == 200
    assert first.headers["cache-control"] == "no-cache"


def test_nothing_is_inline_so_that_the_policy_lets_everything_run(elements):
    assert elements.inline == ""
    assert "style" not in [tag for tag, _ in elements.tags]
    names = {name for _, attributes in elements.tags for name in attributes}
    assert not {name for name in names if name == "style" or name.startswith("on")}


@pytest.mark.parametrize("name", ["page.html", "page.js", "page.css"])
def test_no_file_names_another_server(name):
    text = (FILES / name).read_text(encoding="utf-8")

    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"""(?:src|href)=["']//""", text)


MARKUP = (
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"),
    *("eval(", "new Function"),
)


@pytest.mark.parametrize("name", MARKUP)
def test_the_script_evaluates_no_text_and_writes_no_markup(name):
    assert name not in SCRIPT


@pytest.mark.parametrize("name", ["localStorage", "sessionStorage", "indexedDB", "document.cookie"])
def test_the_script_stores_nothing(name):
    assert name not in SCRIPT


def test_every_element_that_the_script_looks_up_is_in_the_page(elements):
    made = set(re.findall(r"\bid: '([\w-]+)'", SCRIPT))

    looked_up = set(re.findall(r"\$\('([\w-]+)'\)", SCRIPT))

    assert looked_up
    assert looked_up <= made | {attributes.get("id") for _, attributes in elements.tags}


def test_every_control_of_the_page_has_a_label(elements):
    labelled = {attributes.get("for") for tag, attributes in elements.tags if tag == "label"}
    controls = [
        attributes
        for tag, attributes in elements.tags
        if tag in ("input", "select", "textarea") and "aria-labelledby" not in attributes
    ]

    assert {attributes["id"] for attributes in controls} <= labelled


def test_the_wheel_has_the_files_of_the_page():
    builder = WheelBuilder(str(Path(__file__).parents[2]))

    packed = {each.distribution_path for each in builder.recurse_included_files()}

    assert {f"ldm_serve/page/{each.name}" for each in FILES.iterdir()} <= packed
    assert len(list(FILES.iterdir())) == len(TYPES)
