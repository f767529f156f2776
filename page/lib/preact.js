// The three libraries under one name each, so that views don't know where they lie.
import { h, render, Fragment } from '../vendor/preact.js';
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from '../vendor/hooks.js';
import htm from '../vendor/htm.js';

const html = htm.bind(h);
export { html, render, Fragment, useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState };
