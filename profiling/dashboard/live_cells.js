// Patches only the cells whose HTML changed, so that nothing jumps, scrolls back or loses its selection while tokens stream.
// value: {cells: {key: escaped HTML}, classes: {key: class names}, attributes: {key: {name: text}}}; keys name [data-cell] nodes.
const nodes = new Map();
const shown = new Map();
const node = (key) => {
  let found = nodes.get(key);
  if (!found || !element.contains(found)) {
    found = element.querySelector(`[data-cell="${CSS.escape(key)}"]`);
    if (found) {
      nodes.set(key, found);
      shown.delete(`cell ${key}`);
      shown.delete(`class ${key}`);
    }
  }
  return found;
};
const changed = (name, text) => {
  if (shown.get(name) === text) return false;
  shown.set(name, text);
  return true;
};
const apply = () => {
  const value = props.value || {};
  for (const [key, html] of Object.entries(value.cells || {})) {
    const target = node(key);
    if (!target || !changed(`cell ${key}`, html)) continue;
    const follow = target.scrollHeight - target.scrollTop - target.clientHeight < 24;
    target.innerHTML = html;
    // Text that streams is followed to its end; a table is read from its top.
    if (follow && !target.querySelector("table")) target.scrollTop = target.scrollHeight;
  }
  for (const [key, names] of Object.entries(value.classes || {})) {
    const target = node(key);
    if (target && changed(`class ${key}`, names)) target.className = names;
  }
  for (const [key, attributes] of Object.entries(value.attributes || {})) {
    const target = node(key);
    if (!target) continue;
    for (const [name, text] of Object.entries(attributes)) {
      if (target.getAttribute(name) !== text) target.setAttribute(name, text);
    }
  }
};
element.addEventListener('click', async (event) => {
  const button = event.target.closest('[data-copy]');
  if (!button || !element.contains(button)) return;
  const source = node(button.dataset.copy);
  const words = button.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent.trim());
    button.textContent = 'copied';
  } catch {
    // Browsers refuse the clipboard outside https and localhost: leave the text selected for the keyboard instead.
    const range = document.createRange();
    range.selectNodeContents(source);
    window.getSelection().removeAllRanges();
    window.getSelection().addRange(range);
    button.textContent = 'selected: press Ctrl+C';
  }
  setTimeout(() => { button.textContent = words; }, 1600);
});
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-save]');
  const table = button && element.contains(button) && node(button.dataset.save).querySelector('table');
  if (!table) return;
  // A cell that spans columns comes with empty ones behind it, so that all lines are equally long.
  const cells = (row) => [...row.cells].flatMap((cell) => [
    cell.dataset.value ?? cell.textContent.trim().replace(/\s+/g, ' '), ...Array(cell.colSpan - 1).fill(''),
  ]);
  saveCsv([...table.rows].map(cells), button.dataset.file);
});
// A `data-trigger` button tells the server its data-… of the same name as an event; with `data-confirm`, only when pressed twice.
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-trigger]');
  if (!button || !element.contains(button)) return;
  const { trigger: name, confirm, ...data } = button.dataset;
  if (!confirm || button.classList.contains('confirming')) {
    button.disabled = true;
    trigger(name, data);
    return;
  }
  const words = button.textContent;
  button.classList.add('confirming');
  button.textContent = confirm;
  setTimeout(() => {
    button.classList.remove('confirming');
    button.textContent = words;
  }, 3000);
});
apply();
watch('value', apply);
