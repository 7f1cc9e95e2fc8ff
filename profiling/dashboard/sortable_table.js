// A table that sorts by a click on a head and shows the lines that a word and a menu leave; the server sends its lines once.
// value: {columns: [{name, title, digits, swatches, choose}], lines: [[cell]], file, words}; cells are text or numbers.
const host = element.querySelector('[data-table]');
const search = element.querySelector('[data-search]');
const menu = element.querySelector('[data-menu]');
const count = element.querySelector('[data-count]');
let order = { column: null, down: true };
const menuColumn = () => props.value.columns.findIndex((column) => column.choose);
const shownLines = () => {
  const { lines } = props.value;
  const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const place = menuColumn();
  const kept = lines.filter((line) => (!menu.value || line[place] === menu.value)
    && words.every((word) => line.some((cell) => String(cell).toLowerCase().includes(word))));
  if (order.column === null) return kept;
  const sign = order.down ? -1 : 1;
  return [...kept].sort((a, b) => {
    const [left, right] = [a[order.column], b[order.column]];
    return sign * (typeof left === 'number' && typeof right === 'number' ? left - right : String(left).localeCompare(String(right)));
  });
};
const worded = (cell, column) => (typeof cell !== 'number' ? String(cell)
  : cell.toLocaleString('en', { minimumFractionDigits: column.digits, maximumFractionDigits: column.digits }));
const node = (name, parent, text, className) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  parent.appendChild(made);
  return made;
};
const draw = () => {
  const { columns, lines } = props.value;
  const shown = shownLines();
  count.textContent = shown.length === lines.length ? `${lines.length} lines` : `${shown.length} of ${lines.length} lines`;
  const table = document.createElement('table');
  table.className = 'sortable';
  const head = node('tr', node('thead', table));
  columns.forEach((column, place) => {
    const cell = node('th', head, undefined, column.digits === null ? '' : 'number');
    cell.scope = 'col';
    const sorted = order.column === place;
    cell.ariaSort = sorted ? (order.down ? 'descending' : 'ascending') : 'none';
    const button = node('button', cell, `${column.name}${sorted ? (order.down ? ' ▾' : ' ▴') : ''}`);
    button.type = 'button';
    button.title = column.title || `sort by ${column.name}`;
    button.dataset.sort = place;
  });
  const body = node('tbody', table);
  for (const line of shown) {
    const row = node('tr', body);
    columns.forEach((column, place) => {
      const cell = node(place === 0 ? 'th' : 'td', row, undefined, column.digits === null ? '' : 'number');
      if (column.swatches && column.swatches[line[place]]) {
        node('span', cell, undefined, 'swatch').style.setProperty('--accent', column.swatches[line[place]]);
      }
      cell.appendChild(document.createTextNode(worded(line[place], column)));
      if (column.digits === null) cell.title = line[place];
    });
  }
  host.replaceChildren(table);
};
const refill = () => {
  const place = menuColumn();
  const chosen = menu.value;
  const entries = place < 0 ? [] : [...new Set(props.value.lines.map((line) => line[place]))];
  menu.hidden = entries.length < 2;
  menu.replaceChildren(...[['', `every ${place < 0 ? '' : props.value.columns[place].name}`], ...entries.map((name) => [name, name])]
    .map(([value, words]) => Object.assign(document.createElement('option'), { value, textContent: words })));
  menu.value = entries.includes(chosen) ? chosen : '';
  draw();
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button || !element.contains(button)) return;
  if (button.dataset.save !== undefined) {
    saveCsv([props.value.columns.map((column) => column.name), ...shownLines()], host.dataset.file);
  } else if (button.dataset.sort !== undefined) {
    const column = Number(button.dataset.sort);
    const numbers = props.value.columns[column].digits !== null;
    order = { column, down: order.column === column ? !order.down : numbers };
    draw();
    host.querySelector(`[data-sort="${column}"]`).focus();
  }
});
search.addEventListener('input', draw);
menu.addEventListener('change', draw);
refill();
watch('value', refill);
