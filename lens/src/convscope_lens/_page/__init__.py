"""The HTML page of the report and of `convscope ui`.

`page_data` fetches what the page shows, `html` assembles the document, `report` writes it to files and `server` serves
it. `page.js` and `page.css`, which draw it, are built from lens/web: `make page`.
"""
