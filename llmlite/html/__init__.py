"""The report as one HTML file: plots and a page, for one run or several beside each other."""
