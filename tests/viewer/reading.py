"""Pages as a parser sees them: elements with their attributes and texts, and what may not be in them."""

import dataclasses
from html.parser import HTMLParser

_EMPTY = {"meta", "link", "input", "img", "br", "hr"}


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict
    children: list = dataclasses.field(default_factory=list)

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self):
        return set((self.attributes.get("class") or "").split())

    def all(self, tag=None, **attributes):
        """Elements within, by tag and attributes; `class_` is one of the classes."""
        found = []
        for child in self.children:
            if isinstance(child, str):
                continue
            wanted = dict(attributes)
            class_ = wanted.pop("class_", None)
            if (
                (tag is None or child.tag == tag)
                and (class_ is None or class_ in child.classes)
                and all(child.attributes.get(name) == value for name, value in wanted.items())
            ):
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def one(self, tag=None, **attributes):
        (found,) = self.all(tag, **attributes)
        return found


class _Parser(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in _EMPTY:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(html):
    """The page's elements, all of which are closed as they were opened."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert [element.tag for element in parser.open] == ["document"]
    return parser.root


def assert_harmless(page):
    """Nothing in a page runs, but its own scripts, and nothing is loaded from elsewhere."""
    for element in page.all():
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"]
        assert element.tag not in {"img", "iframe", "object", "embed", "b" if False else "base"}
        if element.tag == "script":
            assert element.text == ""
            assert "assets/" in element.attributes["src"]
        for name in ("src", "href", "action"):
            value = element.attributes.get(name) or ""
            assert "//" not in value, value
            assert value.split(":")[0] not in {"javascript", "http", "https"}
    assert "\0" not in page.text
    for mark in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
        assert mark not in page.text
