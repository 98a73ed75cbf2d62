"""Makes small PDFs."""

import zlib


def pdf(*pages: bytes, packed: bool = False) -> bytes:
    """Returns a PDF of pages with these contents, in Helvetica; without a table of places, which readers make up."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for content in pages:
        data = zlib.compress(content) if packed else content
        filters = b"/Filter /FlateDecode" if packed else b""
        objects.append(b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(data), filters, data))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R /Resources << /Font << /F1 3 0 R >>"
            b" >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, content) for number, content in enumerate(objects, 1))
    return b"%PDF-1.4\n" + body + b"trailer\n<< /Size %d /Root 1 0 R >>\n%%%%EOF" % (len(objects) + 1)
