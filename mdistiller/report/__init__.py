"""Reports: runs compared over seeds, as Markdown, CSV and one HTML page.

`runs` reads the folders, `groups` puts together what differs only in the seed, `numbers` has the
statistics, `published` the numbers of papers; `tables`, `listings` and `curves` make a `document`
of them, which `page` draws.
"""
