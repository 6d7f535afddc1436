
// A click on a column's title sorts its table; a second one turns the order. The mean stays the last row.
for (const head of document.querySelectorAll("thead th")) {
  head.tabIndex = 0;
  head.onkeydown = (event) => event.key === "Enter" && head.click();
  head.onclick = () => {
    const table = head.closest("table"), body = table.tBodies[0];
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const text = (row) => row.cells[head.cellIndex].textContent;
    const compare = (a, b) => parseFloat(a) - parseFloat(b) || a.localeCompare(b);
    const rows = [...body.rows], last = table.className === "mean" ? [rows.pop()] : [];
    body.append(...rows.sort((a, b) => sign * compare(text(a), text(b))), ...last);
  };
}
