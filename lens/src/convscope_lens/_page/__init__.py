"""The HTML page of the report and of `convscope ui`.

`scene` fetches the data that the page shows, `report` assembles the HTML, `server` serves it, and `page.js` draws it.
"""
