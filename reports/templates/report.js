"use strict";
(() => {
  const root = document.documentElement;
  const remembered = (value) => {
    // Pages opened as files may have no access to storage.
    try {
      if (value === undefined) return localStorage.getItem("glua-bench-theme");
      localStorage.setItem("glua-bench-theme", value);
    } catch (error) { /* the theme is not remembered */ }
    return null;
  };
  const before = remembered();
  if (before === "dark" || before === "light") root.dataset.theme = before;
  document.getElementById("theme").addEventListener("click", () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
    remembered(root.dataset.theme);
  });

  // A hint stands above what is wider than the page.
  const scrolls = [...document.querySelectorAll(".scroll")];
  const hint = () => {
    for (const box of scrolls) {
      const wide = box.scrollWidth > box.clientWidth + 1;
      box.classList.toggle("wide", wide);
      box.previousElementSibling.hidden = !wide;
    }
  };
  addEventListener("resize", hint);
  hint();

  const show = (table, accepts) => {
    for (const row of table.tBodies[0].rows) row.hidden = !accepts(row);
  };
  const key = (row, index) => {
    const cell = row.cells[index];
    return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
  };
  for (const figure of document.querySelectorAll("figure.table")) {
    const table = figure.querySelector("table");
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, index) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const rows = [...table.tBodies[0].rows];
        const values = rows.map((row) => key(row, index)).filter((value) => value !== "");
        const numeric = values.every((value) => !Number.isNaN(Number(value)));
        // Sort numbers descending and words ascending first; a second click reverses the order.
        const now = head.getAttribute("aria-sort");
        const up = now ? now === "descending" : !numeric;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        rows.sort((a, b) => {
          const [x, y] = [key(a, index), key(b, index)];
          if (x === "" || y === "") return (x === "") - (y === "");  // missing values last
          const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
          return up ? order : -order;
        });
        rows.forEach((row) => row.classList.remove("ruled"));
        table.tBodies[0].append(...rows);
      });
    });
    const search = figure.querySelector("input[type=search]");
    if (search) search.addEventListener("input", () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      show(table, (row) => words.every((word) => row.textContent.toLowerCase().includes(word)));
    });
  }
  const runs = document.querySelector("#table-runs table");
  for (const link of document.querySelectorAll("a[data-runs]")) {
    link.addEventListener("click", () => {
      if (!runs) return;
      const ids = new Set(link.dataset.runs.split(" "));
      const search = document.querySelector("#table-runs input[type=search]");
      if (search) search.value = "";
      show(runs, (row) => ids.has(row.cells[0].textContent));
    });
  }
})();
