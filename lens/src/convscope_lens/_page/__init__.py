"""Pages in HTML of what a network sees: the report, a file, and the page to play with, served on this machine.

Both are the same page: `scene` says what it shows, as plain values; `assets` puts it together; `page.js` draws it.
"""
