// Long lists. They come a page at a time, and only the rows near the window are in the page; the rest is space, so that the scroll
// bar tells the truth.
import { get, query } from './api.js';
import { useEffect, useLayoutEffect, useRef, useState } from '../vendor/preact.js';

// What matches `values`, and `more` of it. Another `turn` asks anew; what was shown stays until the answer comes.
export function usePages(path, values, turn) {
  const [list, setList] = useState({ items: [], isLoading: true });
  const current = useRef(0);
  const load = async (cursor, before) => {
    const mine = (current.current += 1);
    const set = (change) => { if (mine === current.current) setList(change); };
    set((old) => ({ ...old, isLoading: true, error: null }));
    try {
      const page = await get(`${path}${query({ ...values, cursor })}`);
      set({ ...page, items: [...before, ...page.items], isLoading: false });
    } catch (error) {
      set((old) => ({ ...old, error, isLoading: false }));
    }
  };
  const again = () => { load(null, []); };
  useEffect(again, [path, JSON.stringify(values), turn]);
  return { ...list, again, more: () => { if (list.next && !list.isLoading) load(list.next, list.items); } };
}

const AROUND = 8; // rows; `j` and `k` find the next one there before it is seen

const phone = matchMedia('(max-width: 900px)');

// For rows that are all of one height. Gives the range to draw, the space around it, and the ref of what holds the rows.
export function useWindow(count, { wide, narrow }) {
  const host = useRef();
  const [range, setRange] = useState([0, 40]);
  const height = phone.matches ? narrow : wide;
  useLayoutEffect(() => {
    const look = () => {
      const top = host.current?.getBoundingClientRect().top ?? 0;
      const from = Math.max(0, Math.floor(-top / height) - AROUND);
      const to = Math.min(count, Math.ceil((innerHeight - top) / height) + AROUND);
      setRange((old) => (old[0] === from && old[1] === to ? old : [from, Math.max(from, to)]));
    };
    look();
    addEventListener('scroll', look, { passive: true });
    addEventListener('resize', look);
    return () => { removeEventListener('scroll', look); removeEventListener('resize', look); };
  }, [count, height]);
  const [from, to] = [Math.min(range[0], count), Math.min(range[1], count)];
  return { host, from, to, style: { paddingTop: `${from * height}px`, paddingBottom: `${(count - to) * height}px` } };
}
