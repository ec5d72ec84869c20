"""Files that hold files: .zip, .epub, .eml."""

from __future__ import annotations

import posixpath
import tempfile
import zipfile
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
    version = 1

    def load(self, file: Path, path: str) -> Document:
        check_zip(file, "a zip file")
        builder = DocumentBuilder()
        with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory() as folder:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > _MAX_MEMBERS:
                raise LoadError(
                    f"it holds {len(members):,} files; up to {_MAX_MEMBERS:,} are read. Unpack it."
                )
            for number, member in enumerate(sorted(members, key=lambda member: member.filename)):
                name = _member_name(member)
                reason = self._add(builder, archive, member, name, Path(folder) / str(number))
                if reason:
                    builder.warnings.append(f"{name}: {reason}")
        return builder.build(path, self.media_type)

    def _add(
        self, builder: DocumentBuilder, archive: zipfile.ZipFile, member: zipfile.ZipInfo,
        name: str, target: Path,
    ) -> str:
        """Add one member. Returns why it is left out, "" where it isn't."""
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
            document = load_document(file, name)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, LoadError) as error:
            return clean_line(str(error))
        finally:
            file.unlink(missing_ok=True)
        if document.text.strip():
            builder.add_heading(1, name)
            builder.add_document(document, levels_below=1)
        builder.warnings += [f"{name}: {warning}" for warning in document.warnings]
        return ""


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
    version = 1

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
                    if item is None or "nav" in (item.get("properties") or "").split():
                        continue
                    inner = posixpath.join(
                        posixpath.dirname(package_path), unquote(item.get("href") or "")
                    )
                    page = decode_text(archive.read(posixpath.normpath(inner))).text
                    add_html(builder, page)
        except (KeyError, zipfile.BadZipFile, etree.XMLSyntaxError, EOFError) as error:
            raise LoadError(f"this EPUB book is damaged: {clean_line(str(error))}") from error
        return builder.build(path, self.media_type, title=clean_line(title))


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
    version = 1

    def load(self, file: Path, path: str) -> Document:
        with file.open("rb") as stream:
            message = BytesParser(policy=policy.default).parse(stream)
        if not isinstance(message, EmailMessage) or not (message["from"] or message["subject"]):
            raise LoadError("this is not an e-mail message (it has neither sender nor subject).")
        builder = DocumentBuilder()
        subject = clean_line(str(message["subject"] or ""))
        builder.add_heading(1, subject)
        lines = [
            f"{name}: {clean_line(str(message[name]))}"
            for name in ("From", "To", "Cc", "Date")
            if message[name]
        ]
        builder.add_paragraph("\n".join(lines))
        body = message.get_body(preferencelist=("plain", "html"))
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
