"""Files that hold files: .zip, .epub, .eml."""

from __future__ import annotations

import posixpath
import tempfile
import zipfile
import zlib
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from ingest.archive import check_zip
from ingest.builder import DocumentBuilder, clean_line
from ingest.encoding import decode_text
from ingest.loaders.html import add_html
from ingest.loaders.text import normalise_lines
from rag.document import Document
from rag.errors import LoadError

_MAX_MEMBERS = 5_000


class ZipLoader:
    """.zip files: every document in it, under a heading with its name. Zips in zips are not opened."""

    media_type = "zip"
    suffixes: tuple[str, ...] = (".zip",)
    version = 2

    def load(self, file: Path, path: str) -> Document:
        check_zip(file, "a zip file")
        builder = DocumentBuilder()
        read: list[tuple[Document, int]] = []  # (document, where its text begins)
        with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory() as folder:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > _MAX_MEMBERS:
                raise LoadError(
                    f"it holds {len(members):,} files; up to {_MAX_MEMBERS:,} are read. Unpack it."
                )
            for number, member in enumerate(sorted(members, key=lambda member: member.filename)):
                name = _member_name(member)
                found = self._read(archive, member, name, Path(folder) / str(number))
                if isinstance(found, str):
                    builder.warnings += [f"{name}: {found}"] if found else []
                    continue
                builder.warnings += [f"{name}: {warning}" for warning in found.warnings]
                if found.text.strip():
                    builder.add_heading(1, name)
                    read.append((found, builder.add_document(found, levels_below=1)))
        if len(read) == 1:  # of several, "page 3" would not say of which
            (document, start), = read
            for number, page in enumerate(document.pages):
                begins = min(start + page.start, builder.length) if number else 0
                builder.begin_page_at(page.number, begins)
        return builder.build(path, self.media_type)

    def _read(
        self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, target: Path
    ) -> Document | str:
        """One member's document, or why it is left out: "" where nobody would miss it."""
        from ingest.loaders import find_loader, load_document, why_skipped

        parts = PurePosixPath(name).parts
        if any(part.startswith((".", "~$")) or part == "__MACOSX" for part in parts if part != ".."):
            return ""
        loader = find_loader(name)
        if loader is None or loader.media_type == self.media_type:
            return "an archive in an archive, not opened" if loader else why_skipped(name)
        # Unpacked under a name of our own: what the archive calls it ("../../x") is only a title.
        file = target.with_suffix(PurePosixPath(name).suffix)
        try:
            file.write_bytes(archive.read(member))
            return load_document(file, name)
        except LoadError as error:
            return clean_line(str(error))
        except MemoryError:
            raise
        except Exception as error:  # whatever is wrong with it, the others can be read
            return f"can't be read, it may be damaged ({_describe(error)})"
        finally:
            file.unlink(missing_ok=True)


def _describe(error: Exception) -> str:
    return clean_line(str(error))[:200] or type(error).__name__


def _member_name(member: zipfile.ZipInfo) -> str:
    """Windows writes Chinese names in GBK and doesn't say so."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return decode_text(member.filename.encode("cp437")).text
    except UnicodeEncodeError:
        return member.filename


class EpubLoader:
    """.epub books, in the order in which they are read."""

    media_type = "epub"
    suffixes: tuple[str, ...] = (".epub",)
    version = 2

    def load(self, file: Path, path: str) -> Document:
        from lxml import etree

        check_zip(file, "an EPUB book")
        builder = DocumentBuilder()
        try:
            with zipfile.ZipFile(file) as archive:
                package_path, package = _read_package(archive)
                title = package.findtext(".//{*}metadata/{*}title") or ""
                manifest = {item.get("id"): item for item in package.iterfind(".//{*}manifest/{*}item")}
                for reference in package.iterfind(".//{*}spine/{*}itemref"):
                    item = manifest.get(reference.get("idref"))
                    if item is not None and "nav" in (item.get("properties") or "").split():
                        continue
                    href = unquote(item.get("href") or "") if item is not None else ""
                    inner = posixpath.normpath(posixpath.join(posixpath.dirname(package_path), href))
                    name = href or f"chapter {reference.get('idref')}"
                    if trouble := _add_chapter(builder, archive, inner):
                        builder.warnings.append(f"{name}: left out, {trouble}")
        except (KeyError, zipfile.BadZipFile, zlib.error, etree.XMLSyntaxError, EOFError) as error:
            raise LoadError(f"this EPUB book is damaged: {clean_line(str(error))}") from error
        if not builder.length and builder.warnings:
            raise LoadError(f"no chapter of this EPUB book can be read. {builder.warnings[0]}")
        return builder.build(path, self.media_type, title=clean_line(title))


def _add_chapter(builder: DocumentBuilder, archive: zipfile.ZipFile, inner: str) -> str:
    """Add one of a book's pages. Returns what is wrong with it, "" where nothing is."""
    try:
        data = archive.read(inner)
    except KeyError:
        return "the book does not hold it"
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        return f"it is damaged ({_describe(error)})"
    num_warnings = len(builder.warnings)
    try:
        add_html(builder, decode_text(data).text, is_book=True)
    except LoadError as error:
        return clean_line(str(error))
    builder.warnings[num_warnings:] = [
        f"{posixpath.basename(inner)}: {warning}" for warning in builder.warnings[num_warnings:]
    ]
    return ""


def _read_package(archive: zipfile.ZipFile) -> tuple[str, Any]:
    """The path and the root element of the book's package file."""
    from lxml import etree

    # No entities are expanded: a few lines of XML could stand for gigabytes.
    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    container = etree.fromstring(archive.read("META-INF/container.xml"), parser)
    found = container.find(".//{*}rootfile")
    package_path = str(found.get("full-path")) if found is not None else ""
    return package_path, etree.fromstring(archive.read(package_path), parser)


class EmailLoader:
    """.eml messages: subject, who and when, the text; attachments are named, not read."""

    media_type = "eml"
    suffixes: tuple[str, ...] = (".eml",)
    version = 2

    def load(self, file: Path, path: str) -> Document:
        with file.open("rb") as stream:
            message = BytesParser(policy=policy.default).parse(stream)
        if not isinstance(message, EmailMessage) or not (message["from"] or message["subject"]):
            raise LoadError("this is not an e-mail message (it has neither sender nor subject).")
        body = message.get_body(preferencelist=("plain", "html"))
        _decode_headers(message, body.get_content_charset() if body is not None else None)
        builder = DocumentBuilder()
        subject = clean_line(str(message["subject"] or ""))
        builder.add_heading(1, subject)
        lines = [
            f"{name}: {clean_line(str(message[name]))}"
            for name in ("From", "To", "Cc", "Date")
            if message[name]
        ]
        builder.add_paragraph("\n".join(lines))
        if body is not None:
            data = body.get_payload(decode=True)
            text = decode_text(
                data if isinstance(data, bytes) else b"", declared=body.get_content_charset()
            ).text
            if body.get_content_subtype() == "html":
                add_html(builder, text)
            else:
                builder.add_paragraph(normalise_lines(text))
        names = [part.get_filename() or "unnamed" for part in message.iter_attachments()]
        if names:
            builder.warnings.append(f"attachments are not read: {', '.join(map(clean_line, names))}")
        return builder.build(path, self.media_type, title=subject)


def _decode_headers(message: EmailMessage, declared: str | None) -> None:
    """Headers sent in bytes beyond ASCII name no encoding: it is the body's, or found out for all together."""
    raw = {
        name: str(value).encode("ascii", "surrogateescape")
        for name, value in message.raw_items()
        if name.lower() in ("from", "to", "cc", "subject") and any("\udc80" <= c <= "\udcff" for c in str(value))
    }
    if not raw:
        return
    texts = decode_text(b"\n\n".join(raw.values()), declared=declared).text.split("\n\n")
    for name, text in zip(raw, texts, strict=True):
        message.replace_header(name, clean_line(text))
