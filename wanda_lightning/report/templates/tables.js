for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const text = new Intl.Collator(undefined, {numeric: true}).compare;
    const compare = (a, b) => isNaN(a) - isNaN(b) || (isNaN(a) ? text(a, b) : a - b);  // numbers are before text
    button.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const order = (a, b) => (a === "") - (b === "") || sign * compare(a, b);  // empty cells are last
      body.append(...[...body.rows].sort((one, other) => order(key(one), key(other))));
    });
  });
  if (body.rows.length > 8) {
    const search = '<label class="search"><input type="search" placeholder="Search this table"><span></span></label>';
    table.parentElement.insertAdjacentHTML("beforebegin", search);
    const [input, count] = table.parentElement.previousElementSibling.children;
    input.setAttribute("aria-label", `Search the table: ${table.getAttribute("aria-label")}`);
    input.oninput = () => {
      const words = input.value.toLowerCase().split(/\s+/), rows = [...body.rows];
      rows.forEach((row) => row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)));
      count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    };
    input.oninput();
  }
}
