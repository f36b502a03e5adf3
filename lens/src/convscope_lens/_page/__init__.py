"""The HTML page of the report and of `convscope ui`.

`page_data` fetches the data of the page, `report` assembles the HTML, `server` serves it, and `page.js` draws it.
"""
