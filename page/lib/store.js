// What the page knows of the daemon, and the clock it goes by. One object, changed by events; views draw from it.
import { follow, get, hasToken, setToken } from './api.js';
import { useEffect, useReducer, useRef } from '../vendor/preact.js';

// Events come every second, or every 5 s where machines share a store.
const SILENCE_MS = 12_000;
const RETRY_MS = 2_000;
const SAMPLES = 180;
// Files that are remembered after they were settled, too: more than a window shows.
const FILES_MAX = 2_000;

export const state = {
  // 'connecting', 'live', 'lost', 'frozen', or 'token': the daemon wants one.
  contact: 'connecting',
  // When the last event came, by the daemon's clock in milliseconds.
  heard: null,
  why: '',
  session: null,
  overview: null,
  files: new Map(),
  filesCut: false,
  destinations: [],
  // By destination; '' is all together.
  series: new Map(),
};

const watchers = new Set();
let drawn = 0;
function changed() {
  // Several events of one moment are drawn once.
  if (!drawn) drawn = requestAnimationFrame(() => { drawn = 0; watchers.forEach((draw) => draw()); });
}
export function useLive() {
  const [, draw] = useReducer((n) => n + 1, 0);
  useEffect(() => { watchers.add(draw); return () => watchers.delete(draw); }, []);
  return state;
}

let ahead = 0; // of this machine's clock, in milliseconds
// The daemon's clock; it stands still where nothing is live.
export const now = () => (state.contact === 'live' || state.heard == null ? Date.now() + ahead : state.heard);
export const isLive = () => state.contact === 'live';
export const mayOperate = () => state.session?.role === 'operate' && state.contact !== 'lost';

function take(name, data) {
  if (name === 'overview') {
    state.overview = data;
    state.heard = Date.parse(data.at);
    ahead = state.heard - Date.now();
  } else if (name === 'files') {
    // What is no longer open stays as it was last seen: a row must not vanish under the pointer.
    for (const file of data.items) if (file.id) state.files.set(file.id, file);
    for (const id of state.files.keys()) if (state.files.size > FILES_MAX) state.files.delete(id); else break;
    state.openFiles = data.items.filter((file) => file.state !== 'done' && file.state !== 'failed');
    state.filesCut = Boolean(data.cut);
  } else if (name === 'destinations') {
    state.destinations = data.items;
  } else if (name === 'sample') {
    for (const [key, sample] of Object.entries(data.destinations)) {
      const series = state.series.get(key);
      if (series) append(series, { at: data.at, ...sample });
    }
  }
  changed();
}

function append(series, sample) {
  // The first sample of a stream may be the last of what was asked for.
  if (series.at.length && Date.parse(sample.at) <= Date.parse(series.at.at(-1))) return;
  for (const [key, values] of Object.entries(series)) {
    if (!Array.isArray(values)) continue;
    values.push(key in sample ? sample[key] : null);
    if (values.length > SAMPLES) values.shift();
  }
  series.version = (series.version ?? 0) + 1;
}

// The last 15 minutes of a destination; events keep them up to date.
export async function loadSeries(destination) {
  if (state.series.has(destination)) return;
  const series = await get(`/series${destination ? `?destination=${encodeURIComponent(destination)}` : ''}`);
  state.series.set(destination, { ...series, version: 0 });
  changed();
}

let stream = null;
let watchdog = 0;
async function run() {
  const mine = new AbortController();
  stream = mine;
  const heard = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => mine.abort('silence'), SILENCE_MS);
  };
  try {
    state.session = await get('/session', mine.signal);
    heard();
    // A gap in the samples must not look like a straight line: what was asked for before is asked for again.
    const wanted = [...state.series.keys()];
    state.series.clear();
    await follow('/events', (name, data) => {
      heard();
      if (name === 'bye') { state.why = data.why === 'stopping' ? 'the daemon stops' : ''; return; }
      if (state.contact !== 'live') { state.contact = 'live'; state.why = ''; wanted.forEach(loadSeries); }
      take(name, data);
    }, mine.signal);
    if (stream === mine) state.contact = 'lost';
  } catch (error) {
    if (stream !== mine) return;
    if (error.status === 401) {
      state.why = hasToken() ? 'This token isn’t valid any more, or never was.' : '';
      setToken(null);
      state.contact = 'token';
    } else {
      state.contact = 'lost';
      state.why = error.status ? error.message : '';
    }
  }
  clearTimeout(watchdog);
  changed();
  if (state.contact === 'lost') setTimeout(() => { if (stream === mine) run(); }, RETRY_MS);
}

export const start = () => { run(); };

export function enter(token) {
  setToken(token);
  state.contact = 'connecting';
  changed();
  run();
}

// Stands still for reading; going on begins a new stream, which begins with everything.
export function freeze() {
  if (state.contact === 'frozen') { state.contact = 'connecting'; run(); }
  else if (state.contact === 'live') { const old = stream; stream = null; state.contact = 'frozen'; old.abort(); }
  changed();
}

// What a view asks for itself: at once, when `key` changes, and every `everyMs` while the page is live.
export function useAsk(path, everyMs = 0) {
  const [, draw] = useReducer((n) => n + 1, 0);
  const box = useRef({ path: null, data: null, error: null }).current;
  const ask = async (signal) => {
    try {
      box.data = await get(path, signal);
      box.error = null;
    } catch (error) {
      if (error.name === 'AbortError') return;
      box.error = error;
    }
    box.path = path;
    draw();
  };
  useEffect(() => {
    if (!path) return undefined;
    const abort = new AbortController();
    ask(abort.signal);
    const timer = everyMs && setInterval(() => isLive() && !document.hidden && ask(abort.signal), everyMs);
    return () => { abort.abort(); clearInterval(timer); };
  }, [path]);
  // Of another path: not to be shown under this one.
  const current = box.path === path;
  return { data: current ? box.data : null, error: current ? box.error : null, again: () => ask() };
}
