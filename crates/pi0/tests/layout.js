// Appended to a copy of a report: writes how many labels its charts have, and each that leaves its chart or touches
// another, and each table that is wider than its section.
const problems = [];
let labels = 0;
for (const svg of document.querySelectorAll('svg:not(.gauge)')) {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  labels += texts.length;
  texts.forEach(([name, a], i) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1) {
      problems.push(`cut off: ${name}`);
    }
    for (const [other, b] of texts.slice(i + 1)) {
      // Boxes of text have air above and below their letters.
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 4) problems.push(`${name} over ${other}`);
    }
  });
}
for (const table of document.querySelectorAll('table')) {
  const section = table.closest('section').getBoundingClientRect();
  if (table.getBoundingClientRect().right > section.right) problems.push(`too wide: ${table.textContent.slice(0, 40)}`);
}
const result = document.createElement('pre');
result.id = 'layout';
result.textContent = labels + '\n' + problems.join('\n');
document.body.append(result);
