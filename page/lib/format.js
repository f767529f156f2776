// Numbers, times and foreign text, as an operator reads them. What isn't known is a dash, never a zero.
export const DASH = '–';
const whole = new Intl.NumberFormat('en-GB', { maximumFractionDigits: 0 });
const two = (n) => String(n).padStart(2, '0');
const known = (n) => typeof n === 'number' && Number.isFinite(n);

export const num = (n) => (known(n) ? whole.format(n) : DASH);

// `2 files`, `1 file`.
export const count = (n, one, many = `${one}s`) => `${num(n)} ${n === 1 ? one : many}`;

// Rounds down, so that 100 % means settled.
export function percent(part, all) {
  if (!known(part) || !known(all)) return DASH;
  if (all === 0) return '100.0 %';
  return `${(Math.floor((part / all) * 1000) / 10).toFixed(1)} %`;
}

// The share of something rare: two digits more, and never a zero for what did happen.
export function share(part, all) {
  if (!known(part) || !known(all) || all === 0) return DASH;
  const percent = (part / all) * 100;
  return part > 0 && percent < 0.01 ? '< 0.01 %' : `${percent.toFixed(2)} %`;
}

export const rate = (perSecond) => {
  if (!known(perSecond)) return DASH;
  return `${perSecond > 0 && perSecond < 10 ? perSecond.toFixed(1) : num(perSecond)}/s`;
};

export const ms = (n) => (known(n) ? `${n < 10 ? n.toFixed(1) : num(n)} ms` : DASH);

export function bytes(n) {
  if (!known(n)) return DASH;
  const units = ['B', 'KB', 'MB', 'GB', 'TB'];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1000; unit += 1; }
  return `${n >= 100 || unit === 0 ? num(n) : n.toFixed(1)} ${units[unit]}`;
}

export function duration(seconds) {
  if (!known(seconds)) return DASH;
  const s = Math.max(0, Math.round(seconds));
  if (seconds > 0 && seconds < 1) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} min`;
  return `${Math.floor(s / 86400)} d ${two(Math.floor((s % 86400) / 3600))} h`;
}

const hm = (d) => `${two(d.getHours())}:${two(d.getMinutes())}`;
const hms = (d) => `${hm(d)}:${two(d.getSeconds())}`;
const sameDay = (a, b) => a.toDateString() === b.toDateString();
const dated = (d) => `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;

// With the day before it where that isn't today.
function placed(d, now, text) {
  if (sameDay(d, now)) return text;
  if (sameDay(d, new Date(now.getTime() - 86_400_000))) return `yesterday ${text}`;
  if (sameDay(d, new Date(now.getTime() + 86_400_000))) return `tomorrow ${text}`;
  return `${dated(d)} ${text}`;
}

const parsed = (time) => {
  const d = time == null ? null : new Date(time);
  return d && !Number.isNaN(d.getTime()) ? d : null;
};
// `now` is the daemon's clock, in milliseconds.
export const clock = (time, now) => {
  const d = parsed(time);
  return d ? placed(d, new Date(now), hms(d)) : DASH;
};
export const minute = (time, now) => {
  const d = parsed(time);
  return d ? placed(d, new Date(now), hm(d)) : DASH;
};
// A promise: rounded up to the minute, so that it is never too early.
export const by = (time, now) => {
  const d = parsed(time);
  return d ? minute(Math.ceil(d.getTime() / 60_000) * 60_000, now) : DASH;
};
export const seconds = (from, to) => {
  const [a, b] = [parsed(from), parsed(to)];
  return a && b ? (b.getTime() - a.getTime()) / 1000 : null;
};
export const zone = () => Intl.DateTimeFormat().resolvedOptions().timeZone || 'local time';

// F27, F56: Preact writes text and never markup; this makes visible what would still deceive the eye: control characters,
// and marks that turn the direction of writing or have no width. The notation is that of the command line.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;
const NAMED = { '\n': '\\n', '\r': '\\r', '\t': '\\t', '\0': '\\0' };
export const plain = (text) =>
  text == null ? '' : String(text).replace(HIDDEN, (c) => NAMED[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`);

// The ends of a long id; its title has the whole.
export const shortId = (id) => (id.length > 24 ? `${id.slice(0, 10)}…${id.slice(-9)}` : id);
